"""A study as one HTML file, Markdown, text or JSON."""
