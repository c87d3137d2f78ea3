# The MLflow server, without a line of droptune. Build it from this folder:
#   docker build -f server.Dockerfile -t droptune-mlflow:3.17.2 .
FROM python:3.11-slim-bookworm
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --create-home mlflow \
    && install -d -o mlflow -g mlflow /artifacts
RUN pip install --no-cache-dir mlflow==3.17.2 "psycopg[binary]==3.3.9"
COPY --chmod=755 mlflow-server.sh /usr/local/bin/mlflow-server
# Without job execution the server is one process tree of half a gigabyte instead of three
ENV MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false \
    MLFLOW_DISABLE_TELEMETRY=true \
    PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /artifacts
EXPOSE 5000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=6 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://localhost:5000/health', timeout=4)"]
ENTRYPOINT ["tini", "--", "mlflow-server"]
CMD ["--host=0.0.0.0", "--port=5000", "--workers=2", "--artifacts-destination=/artifacts"]
