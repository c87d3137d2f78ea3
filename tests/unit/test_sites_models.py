"""Models that nobody here wrote, unchanged: their sites are pinned, and they train fused."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from droptune.script import script
from droptune.sites.installed import apply_rates, find_sites, install, restore
from droptune.sites.masks import derive_keys, split_seed
from droptune.training import Assignment

transformers = pytest.importorskip("transformers")
logging.getLogger("transformers").setLevel(logging.ERROR)

TOKENS = torch.arange(12).view(2, 6) % 11
LABELS = torch.tensor([0, 2])
PIXELS = torch.linspace(-1, 1, 2 * 3 * 8 * 8, dtype=torch.float64).view(2, 3, 8, 8)


@pytest.fixture(autouse=True)
def _quiet():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def bert():
    config = transformers.BertConfig(
        vocab_size=11,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=3,
    )
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    batch = {"input_ids": TOKENS, "attention_mask": mask, "labels": LABELS}
    return transformers.BertForSequenceClassification(config), batch


def gpt2():
    config = transformers.GPT2Config(vocab_size=11, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config), {"input_ids": TOKENS, "labels": TOKENS}


def t5():
    config = transformers.T5Config(
        vocab_size=11,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration(config)
    return model, {"input_ids": TOKENS, "labels": TOKENS}


def vit():
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    batch = {"pixel_values": PIXELS, "labels": LABELS}
    return transformers.ViTForImageClassification(config), batch


def llama():
    config = transformers.LlamaConfig(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return transformers.LlamaForCausalLM(config), {"input_ids": TOKENS, "labels": TOKENS}


def convnext():
    config = transformers.ConvNextV2Config(
        hidden_sizes=[4, 8],
        depths=[1, 2],
        num_stages=2,
        patch_size=2,
        drop_path_rate=0.2,
        num_labels=3,
    )
    batch = {"pixel_values": PIXELS, "labels": LABELS}
    return transformers.ConvNextV2ForImageClassification(config), batch


def wav2vec():
    config = transformers.Wav2Vec2Config(
        vocab_size=12,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=[8, 8],
        conv_stride=[5, 2],
        conv_kernel=[10, 3],
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        feat_proj_dropout=0.0,
    )
    batch = {
        "input_values": torch.randn(2, 1600).double(),
        "labels": torch.tensor([[1, 2], [3, 4]]),
    }
    return transformers.Wav2Vec2ForCTC(config), batch


def sites_of(text):
    """The rows of a text with `path kind rate calls` on each line."""
    rows = []
    for line in filter(None, map(str.strip, text.splitlines())):
        path, kind, rate, calls = line.split()
        rows.append((path, kind, float(rate), int(calls)))
    return rows


BERT_LAYER = """
    bert.encoder.layer.{0}.attention.self.attention attention 0.1 1
    bert.encoder.layer.{0}.attention.output.dropout element 0.1 1
    bert.encoder.layer.{0}.output.dropout element 0.1 1
"""
GPT2_LAYER = """
    transformer.h.{0}.attn.attention attention 0.1 1
    transformer.h.{0}.attn.resid_dropout element 0.1 1
    transformer.h.{0}.mlp.dropout element 0.1 1
"""
T5_ENCODER_LAYER = """
    encoder.block.{0}.layer.0.SelfAttention.attention attention 0.1 1
    encoder.block.{0}.layer.0.dropout element 0.1 1
    encoder.block.{0}.layer.1.DenseReluDense.dropout element 0.1 1
    encoder.block.{0}.layer.1.dropout element 0.1 1
"""
T5_DECODER_LAYER = """
    decoder.block.{0}.layer.0.SelfAttention.attention attention 0.1 1
    decoder.block.{0}.layer.0.dropout element 0.1 1
    decoder.block.{0}.layer.1.EncDecAttention.attention attention 0.1 1
    decoder.block.{0}.layer.1.dropout element 0.1 1
    decoder.block.{0}.layer.2.DenseReluDense.dropout element 0.1 1
    decoder.block.{0}.layer.2.dropout element 0.1 1
"""
VIT_LAYER = """
    vit.layers.{0}.attention.attention attention 0.0 1
    vit.layers.{0}.dropout element 0.0 2
"""
WAV2VEC_LAYER = """
    wav2vec2.encoder.layers.{0}.attention.attention attention 0.1 1
    wav2vec2.encoder.layers.{0}.dropout element 0.1 1
    wav2vec2.encoder.layers.{0}.feed_forward.intermediate_dropout element 0.1 1
    wav2vec2.encoder.layers.{0}.feed_forward.output_dropout element 0.1 1
"""


def twice(layer):
    return layer.format(0) + layer.format(1)


PINNED = {
    bert: "bert.embeddings.dropout element 0.1 1" + twice(BERT_LAYER) + "dropout element 0.1 1",
    gpt2: "transformer.drop element 0.1 1" + twice(GPT2_LAYER),
    t5: "encoder.dropout element 0.1 2"
    + twice(T5_ENCODER_LAYER)
    + "decoder.dropout element 0.1 2"
    + twice(T5_DECODER_LAYER),
    vit: "vit.embeddings.dropout element 0.0 1" + twice(VIT_LAYER),
    llama: twice("\n model.layers.{0}.self_attn.attention attention 0.0 1"),
    convnext: """
        convnextv2.encoder.stages.1.layers.0.drop_path path 0.1 1
        convnextv2.encoder.stages.1.layers.1.drop_path path 0.2 1
    """,
    wav2vec: """
        wav2vec2.feature_projection.dropout element 0.0 1
        wav2vec2.encoder.dropout element 0.1 1
    """
    + twice(WAV2VEC_LAYER)
    + "dropout element 0.1 1",
}
UNTUNABLE = {wav2vec: {("wav2vec2.encoder", "rand"), ("wav2vec2", "NumPy")}}
MODELS = pytest.mark.parametrize("build", PINNED, ids=lambda build: build.__name__)


@MODELS
def test_sites_of_transformers_models(build):
    model, batch = build()
    found = find_sites(model.double(), batch)
    rows = [(site.path, site.kind, round(site.rate, 6), site.calls) for site in found]
    assert rows == sites_of(PINNED[build])
    assert {(i.module, i.operation) for i in found.untunable} == UNTUNABLE.get(build, set())
    assert found.warnings == ()
    assert find_sites(model, batch) == found


@MODELS
def test_every_rate_can_be_set_in_place(build):
    model, batch = build()
    sites = find_sites(model.double(), batch).sites
    rates = {site.path: 0.01 * (index + 1) for index, site in enumerate(sites)}
    applied = apply_rates(model, rates, sites=sites)
    assert applied.not_set == {}
    assert {s.path: s.rate for s in find_sites(model, batch)} == pytest.approx(rates)


@MODELS
def test_evaluation_is_bit_identical_after_install_and_restore(build):
    model, batch = build()
    model = model.double().eval()
    before = model(**batch).logits
    names = list(model.state_dict())
    installed = install(model, find_sites(model, batch).sites)
    with installed.active(training=False):
        assert torch.allclose(model(**batch).logits, before, atol=1e-12)
    assert torch.equal(model(**batch).logits, before)
    restore(model)
    assert torch.equal(model(**batch).logits, before)
    assert list(model.state_dict()) == names


def step(model, installed, batch, parameters, buffers, rates, keys):
    with installed.active(rates, keys):
        logits = functional_call(model, (parameters, buffers), kwargs=batch).logits
    return logits.log_softmax(-1).square().mean()  # some of their losses are in float32


@pytest.mark.parametrize("build", [bert, gpt2, t5, vit, llama, convnext], ids=lambda b: b.__name__)
def test_transformers_models_train_fused(build):
    """Three slots with rates of their own: one step under vmap is three steps alone."""
    model, batch = build()
    model = model.double().train()
    sites = find_sites(model, batch).sites
    installed, slots = install(model, sites), 3
    seeds = torch.tensor([split_seed(k) for k in range(slots)], dtype=torch.int32)
    keys = derive_keys(seeds, torch.arange(slots, dtype=torch.int32), 0, len(sites))
    rates = torch.rand(slots, len(sites), dtype=torch.float64) * 0.7
    parameters = {
        name: torch.stack([p.detach() + 0.01 * k for k in range(slots)]).requires_grad_()
        for name, p in model.named_parameters()
    }
    buffers = {name: torch.stack([b] * slots) for name, b in model.named_buffers()}

    def one(parameters, buffers, rates, keys):
        return step(model, installed, batch, parameters, buffers, rates, keys)

    losses = vmap(one, randomness="error")(parameters, buffers, rates, keys)
    losses.sum().backward()
    for k in range(slots):
        own = {name: p[k].detach().clone().requires_grad_() for name, p in parameters.items()}
        loss = one(own, {name: b[k] for name, b in buffers.items()}, rates[k], keys[k])
        loss.backward()
        assert abs(loss - losses[k]) < 1e-9
        for name, parameter in own.items():
            if parameter.grad is not None:
                assert (parameter.grad - parameters[name].grad[k]).abs().max() < 1e-9, name


@pytest.mark.parametrize("build", [bert, gpt2, t5, vit, llama], ids=lambda b: b.__name__)
def test_transformers_models_are_evaluated_fused(build):
    model, batch = build()
    model = model.double().eval()
    installed = install(model, find_sites(model, batch).sites)
    parameters = {n: torch.stack([p, p + 0.01]) for n, p in model.named_parameters()}
    buffers = {n: torch.stack([b, b]) for n, b in model.named_buffers()}

    def one(parameters, buffers):
        with installed.active(training=False):
            return functional_call(model, (parameters, buffers), kwargs=batch).logits

    with torch.no_grad():
        together = vmap(one, randomness="error")(parameters, buffers)
        for k in range(2):
            own = ({n: t[k] for n, t in tree.items()} for tree in (parameters, buffers))
            assert torch.allclose(one(*own), together[k], atol=1e-10)


@pytest.mark.parametrize("build", [bert, gpt2], ids=lambda b: b.__name__)
def test_gradient_checkpointing_sees_the_same_masks(build):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model, batch = build()
        model = model.double().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        sites = find_sites(model, batch).sites
        installed = install(model, sites)
        keys = derive_keys(torch.tensor([3, 4], dtype=torch.int32), torch.tensor(0), 0, len(sites))
        with installed.active(torch.full((len(sites),), 0.3, dtype=torch.float64), keys):
            loss = model(**batch).loss
        loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.allclose(plain, recomputed, atol=1e-14)


def test_eager_attention_has_the_same_number_of_sites():
    for build in (bert, gpt2, vit, llama):
        model, batch = build()
        model.set_attn_implementation("eager")
        found = find_sites(model.double(), batch)
        kinds = [(site.kind, site.rate, site.calls) for site in found]
        assert kinds == [(kind, rate, calls) for _, kind, rate, calls in sites_of(PINNED[build])]


# Other architectures, written as their authors' repositories write them


class LockedDropout(nn.Module):
    def forward(self, x, dropout=0.5):
        if not self.training or not dropout:
            return x
        mask = x.data.new(1, x.size(1), x.size(2)).bernoulli_(1 - dropout) / (1 - dropout)
        return mask * x


class WeightDrop(nn.Module):
    def __init__(self, module, weight, dropout):
        super().__init__()
        self.module, self.weight, self.dropout = module, weight, dropout
        self.register_parameter(f"{weight}_raw", nn.Parameter(getattr(module, weight).data))
        module.flatten_parameters = lambda: None

    def forward(self, *args):
        raw = getattr(self, f"{self.weight}_raw")
        dropped = F.dropout(raw, p=self.dropout, training=self.training)
        self.module._parameters[self.weight] = dropped
        vars(self.module)["_flat_weights"][1] = dropped
        return self.module(*args)


class AwdLstm(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.lockdrop = nn.Embedding(11, 8), LockedDropout()
        rnns = [nn.LSTM(8, 8), nn.LSTM(8, 8)]
        self.rnns = nn.ModuleList(WeightDrop(rnn, "weight_hh_l0", 0.5) for rnn in rnns)
        self.decoder = nn.Linear(8, 11)
        self.dropout, self.dropouti, self.dropouth = 0.4, 0.65, 0.3

    def forward(self, tokens):
        output = self.lockdrop(self.encoder(tokens), self.dropouti)
        for layer, rnn in enumerate(self.rnns):
            output, _ = rnn(output)
            if layer != len(self.rnns) - 1:
                output = self.lockdrop(output, self.dropouth)
        return self.decoder(self.lockdrop(output, self.dropout))


def test_awd_lstm():
    found = find_sites(AwdLstm(), TOKENS)
    assert [(site.path, site.kind, site.rate, site.attribute) for site in found] == [
        ("lockdrop.variational", "variational", 0.65, "dropouti"),
        ("rnns.0.dropout", "element", 0.5, "rnns.0.dropout"),
        ("lockdrop.variational_1", "variational", 0.3, "dropouth"),
        ("rnns.1.dropout", "element", 0.5, "rnns.1.dropout"),
        ("lockdrop.variational_2", "variational", 0.4, "dropout"),
    ]
    assert found.sites[0].role == "embedding"
    assert found.untunable == ()


class DenseLayer(nn.Module):  # torchvision
    def __init__(self, inputs, rate):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 8, 1)
        self.norm2, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1)
        self.drop_rate = rate

    def forward(self, inputs):
        x = self.conv1(F.relu(self.norm1(torch.cat(inputs, 1))))
        x = self.conv2(F.relu(self.norm2(x)))
        if self.drop_rate > 0:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x


class DenseNet(nn.Module):
    def __init__(self, rate):
        super().__init__()
        self.conv0 = nn.Conv2d(3, 4, 3)
        self.layers = nn.ModuleList(DenseLayer(4 + 4 * i, rate) for i in range(2))
        self.norm5, self.classifier = nn.BatchNorm2d(12), nn.Linear(12, 3)

    def forward(self, x):
        features = [self.conv0(x)]
        for layer in self.layers:
            features.append(layer(features))
        return self.classifier(F.relu(self.norm5(torch.cat(features, 1))).mean((2, 3)))


def test_densenet_is_warned_about_its_batchnorms():
    found = find_sites(DenseNet(0.2), PIXELS.float())
    assert [(site.path, site.kind, site.feeds) for site in found] == [
        ("layers.0.dropout", "element", "BatchNorm2d"),
        ("layers.1.dropout", "element", "BatchNorm2d"),
    ]
    assert ["layers.0.dropout feeds the BatchNorm layers.1.norm1" in found.warnings[0]] == [True]
    assert "layers.1.dropout feeds the BatchNorm norm5" in found.warnings[1]


def test_sites_that_hide_at_rate_zero_are_told():
    found = find_sites(DenseNet(0.0), PIXELS.float())
    assert found.sites == ()
    assert "layers.0.dropout does not run at rate 0" in found.warnings[0]
    assert "set layers.0.drop_rate to a rate above 0" in found.warnings[0]
    assert len(found.warnings) == 2


class DropPath(nn.Module):  # timm
    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        return x * x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(keep).div_(keep)


class Block(nn.Module):
    def __init__(self, rate):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.drop_path = DropPath(rate)

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(x + self.drop_path(out))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.blocks = nn.Sequential(*(Block(rate) for rate in (0.0, 0.1, 0.2)))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def test_resnet_with_drop_path():
    found = find_sites(ResNet(), PIXELS.float())
    assert [(site.path, site.kind, site.rate, site.feeds, site.attribute) for site in found] == [
        ("blocks.0.drop_path", "path", 0.0, "Conv2d", "blocks.0.drop_path.drop_prob"),
        ("blocks.1.drop_path", "path", 0.1, "Conv2d", "blocks.1.drop_path.drop_prob"),
        ("blocks.2.drop_path", "path", 0.2, "Linear", "blocks.2.drop_path.drop_prob"),
    ]
    assert found.untunable == found.warnings == ()


def test_torch_transformer():
    model = nn.Transformer(8, 2, 1, 1, 16, dropout=0.1, batch_first=True)
    found = find_sites(model, (torch.randn(2, 5, 8), torch.randn(2, 4, 8)))
    assert [(site.path, site.kind) for site in found] == [
        ("encoder.layers.0.self_attn.attention", "attention"),
        ("encoder.layers.0.dropout1", "element"),
        ("encoder.layers.0.dropout", "element"),
        ("encoder.layers.0.dropout2", "element"),
        ("decoder.layers.0.self_attn.attention", "attention"),
        ("decoder.layers.0.dropout1", "element"),
        ("decoder.layers.0.multihead_attn.attention", "attention"),
        ("decoder.layers.0.dropout2", "element"),
        ("decoder.layers.0.dropout", "element"),
        ("decoder.layers.0.dropout3", "element"),
    ]
    assert {site.rate for site in found} == {0.1}


def test_fields_of_the_configuration_are_known_and_printed():
    sites = {site.path: site for site in find_sites(*bert())}
    fields = {site.field for site in sites.values()}
    assert fields == {"config.hidden_dropout_prob", "config.attention_probs_dropout_prob"}
    rates = {p: 0.3 if "attention_probs" in s.field else 0.1 for p, s in sites.items()}
    lines = script(Assignment(rates, 1e-3), list(sites.values()))
    assert "#   config.attention_probs_dropout_prob = 0.3\n" in lines
    assert "#   config.hidden_dropout_prob = 0.1\n" in lines
    lines = script(Assignment({**rates, "dropout": 0.2}, 1e-3), list(sites.values()))
    assert "#   config.hidden_dropout_prob: its sites differ, see above" in lines


def test_fields_inside_a_model_of_ones_own():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.drop = vit()[0], nn.Dropout(0.5)

        def forward(self, x):
            return self.drop(self.body(x).logits)

    sites = find_sites(Wrapped(), PIXELS.float())
    assert {site.field for site in sites} >= {"body.config.hidden_dropout_prob", ""}
