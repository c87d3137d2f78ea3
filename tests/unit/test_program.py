"""Programs in both forms, and loading them from files that people write."""

from __future__ import annotations

import functools
import textwrap
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from droptune.errors import ProgramError
from droptune.program.declared import declared
from droptune.program.loading import load_program, load_program_or_model
from droptune.program.long_form import adapt
from droptune.program.metrics import CLASSIFICATION
from droptune.program.short_form import classification, regression
from droptune.program.source import fingerprint, project_root
from droptune.program.tasks import FEW_CLASSES, log_softmax


def net():
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 4))


def data(n=40):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, generator=generator), torch.arange(n) % 4


def short(**changes):
    given = {"model": net, "train": data(), "batch_size": 8, "epochs": 2, "lr": 1e-2, **changes}
    return classification(**given)


# --- the short form -----------------------------------------------------------------------


def test_the_short_form_trains():
    program = short()
    program.check()
    splits = program.splits(0)
    torch.manual_seed(0)
    model = program.model()
    optimizer = program.optimizer(model, program.lr)
    batch = splits.train.gather(torch.arange(splits.train.n))
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = program.loss(model, batch, {})
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    metrics = program.metrics(*program.predict(model, batch))
    assert tuple(metrics) == program.metric_names == CLASSIFICATION
    assert isinstance(optimizer, torch.optim.AdamW)


@pytest.mark.parametrize("classes", [2, FEW_CLASSES, FEW_CLASSES + 1])
def test_the_log_softmax_over_few_classes_is_torchs(classes):
    logits = torch.randn(64, classes, generator=torch.Generator().manual_seed(0)) * 40
    logits[0, 0], logits[1, 1] = 1e4, -torch.inf
    logits.requires_grad_()
    weight = torch.linspace(-1, 1, 64 * classes).view(64, classes).masked_fill(logits.isinf(), 0)
    found, expected = log_softmax(logits), logits.log_softmax(-1)
    torch.testing.assert_close(found, expected)
    sums = (each.masked_fill(logits.isinf(), 0) * weight for each in (found, expected))
    torch.testing.assert_close(*(torch.autograd.grad(each.sum(), logits)[0] for each in sums))


@pytest.mark.parametrize("shape", [(6, 4), (6, 5, 4), (6, 4, 5), (6, 4, 2, 3)])
@pytest.mark.parametrize("smoothing", [None, 0.0, 0.2])
def test_the_loss_is_cross_entropy(shape, smoothing):
    logits = torch.randn(shape, dtype=torch.float64)
    last = shape[-1] == 4 and len(shape) == 3
    target_shape = shape[:-1] if len(shape) == 2 or last else (shape[0], *shape[2:])
    targets = torch.randint(0, 4, target_shape)
    targets.view(-1)[0] = -100
    values = {} if smoothing is None else {"label_smoothing": torch.tensor(smoothing).double()}
    found = short().loss(lambda x: x, (logits, targets), values)
    torch_form = logits.movedim(-1, 1) if last else logits
    expected = functional.cross_entropy(torch_form, targets, label_smoothing=smoothing or 0.0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_the_loss_runs_under_vmap_with_a_smoothing_each():
    logits, targets = torch.randn(3, 6, 4), torch.randint(0, 4, (6,))
    smoothing = torch.tensor([0.0, 0.1, 0.4])
    program = short()

    def loss(logits, smoothing):
        return program.loss(lambda x: x, (logits, targets), {"label_smoothing": smoothing})

    fused = torch.func.vmap(loss)(logits, smoothing)
    alone = [
        functional.cross_entropy(x, targets, label_smoothing=float(s))
        for x, s in zip(logits, smoothing, strict=True)
    ]
    torch.testing.assert_close(fused, torch.stack(alone))


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_one_logit_is_two_classes(shape):
    logits, targets = torch.randn(shape), torch.tensor([0, 1, 1, 0, 1, 0])
    program = short()
    expected = functional.binary_cross_entropy_with_logits(logits.flatten(), targets.float())
    torch.testing.assert_close(program.loss(lambda x: x, (logits, targets), {}), expected)
    assert program.predict(lambda x: x, (logits, targets))[0].shape == (6, 2)


def test_models_that_return_objects_and_take_names():
    targets = torch.tensor([0, 1])
    batch = {"ids": torch.randn(2, 4), "labels": targets}
    program = short()
    for model in (lambda ids: SimpleNamespace(logits=ids), lambda ids: {"logits": ids}):
        loss = program.loss(model, batch, {})
        torch.testing.assert_close(loss, functional.cross_entropy(batch["ids"], targets))


def test_regression_aligns_a_last_dimension_of_one():
    x, y = torch.randn(40, 3), torch.randn(40)
    program = regression(
        model=lambda: nn.Linear(3, 1), train=(x, y), batch_size=8, epochs=1, lr=0.1
    )
    program.check()
    model = program.model()
    loss = program.loss(model, (x, y), {})
    torch.testing.assert_close(loss, functional.mse_loss(model(x).flatten(), y))
    predictions, targets = program.predict(model, (x, y))
    assert predictions.shape == targets.shape


def test_regression_refuses_shapes_that_would_broadcast():
    program = regression(
        model=lambda: nn.Linear(3, 2), train=data(), batch_size=8, epochs=1, lr=0.1
    )
    with pytest.raises(ProgramError, match=r"shape \(2, 2\) does not fit targets of shape \(2,\)"):
        program.check()


@pytest.mark.parametrize(
    ("given", "kind", "options"),
    [
        ("sgd", torch.optim.SGD, {"momentum": 0.9}),
        ("adam", torch.optim.Adam, {}),
        ("rmsprop", torch.optim.RMSprop, {}),
        (torch.optim.Adagrad, torch.optim.Adagrad, {}),
        (functools.partial(torch.optim.SGD, momentum=0.5), torch.optim.SGD, {"momentum": 0.5}),
        (lambda m, lr: torch.optim.NAdam(m.parameters(), lr), torch.optim.NAdam, {}),
    ],
)
def test_optimizers(given, kind, options):
    made = short(optimizer=given).optimizer(net(), 0.02)
    assert type(made) is kind
    group = made.param_groups[0]
    assert {"lr": group["lr"], **{k: group[k] for k in options}} == {"lr": 0.02, **options}


def test_weight_decay_reaches_the_optimizer():
    made = short(weight_decay=0.03).optimizer(net(), 0.02)
    assert made.param_groups[0]["weight_decay"] == 0.03


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        (None, [1, 1, 1]),
        ("linear", [1, 0.5, 0]),
        ("cosine", [1, 0.5, 0]),
        (lambda progress: 2.0, [2, 2, 2]),
    ],
)
def test_schedules(schedule, factors):
    program = short(schedule=schedule)
    assert [program.schedule(p) for p in (0, 0.5, 1)] == pytest.approx(factors)


def test_own_metrics_join_the_built_in_ones():
    program = short(metrics={"top2": lambda p, t: (p.topk(2).indices == t[:, None]).any(1).float()})
    assert program.metric_names[-1] == "top2"
    assert "top2" in program.metrics(torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0]))


def test_pretrained_weights_are_read_once_and_may_lack_the_head():
    reads = []

    def weights():
        reads.append(1)
        return {"0.weight": torch.ones(8, 3), "0.bias": torch.zeros(8)}

    program = short(pretrained=weights)
    assert all(bool((program.model()[0].weight == 1).all()) for _ in range(3))
    assert len(reads) == 1
    with pytest.raises(ProgramError, match="hold 1 names that the model lacks"):
        short(pretrained={"9.weight": torch.ones(1)}).model()


def test_a_loader_gives_the_batch_size():
    loader = DataLoader(TensorDataset(*data()), batch_size=16)
    assert short(train=loader, batch_size=None).batch_size == 16


def test_data_are_read_once_and_only_when_needed():
    reads = []

    def train():
        reads.append(1)
        return data()

    program = short(train=train)
    assert not reads
    program.splits(0), program.splits(1), program.example_batch()
    assert len(reads) == 1


def test_the_generator_is_left_alone():
    program = short()
    torch.manual_seed(0)
    expected = torch.rand(())
    torch.manual_seed(0)
    program.check()
    program.splits(3)
    assert torch.rand(()) == expected


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": net()}, "model= is a built Sequential: give the class"),
        ({"model": 3}, "model= is a int"),
        ({"optimizer": "adamm"}, r"unknown optimizer 'adamm' \(did you mean 'adam'"),
        ({"optimizer": 3}, "optimizer= is 3"),
        ({"optimizer": lambda m, lr: None, "weight_decay": 0.1}, "set it in the function"),
        ({"schedule": "cosin"}, r"unknown schedule 'cosin' \(did you mean 'cosine'"),
        ({"lr": 0}, "lr=0: it must be a positive float"),
        ({"epochs": 1.5}, "epochs=1.5: it must be a positive int"),
        ({"batch_size": None}, "batch_size= is missing"),
        ({"searched": {"temperature": (0, 1)}}, "nothing that the built-in loss knows"),
        ({"searched": {"l1": (1, 0)}}, r"give \(low, high\)"),
    ],
)
def test_wrong_arguments_are_said_at_once(changes, said):
    with pytest.raises(ProgramError, match=said) as caught:
        short(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        ("relu", "tanh"),
        (0.1, float("nan")),
        (0.1, float("inf")),
        (0, 1, 2),
        {"low": 0, "high": 1, "log": True},
        {"low": "a", "high": "b"},
        {"low": 0.1, "high": 0.1},
        [None, 0.5],
        ["none", 0.1],
        [True, 0.1],
        [0.1, float("nan")],
        ["relu"],
        [1, 1.0],
        "relu",
    ],
)
def test_what_cannot_be_searched_is_said_before_anything_is_trained(values):
    with pytest.raises(
        ProgramError, match=r"searched 'a' is .*: give \(low, high\) with low"
    ) as caught:
        declared({"a": values})
    assert "\n" not in str(caught.value)


def test_what_can_be_searched():
    given = {
        "a": (0, 1),
        "b": {"low": 1e-4, "high": 1, "log": True},
        "c": {"low": -1, "high": 1},
        "d": ["relu", "tanh"],
        "e": [1, 2.5],
        "f": [True, False],
    }
    assert declared(given) == given


def infinite():
    model = nn.Linear(3, 4)
    nn.init.constant_(model.weight, float("inf"))
    return model


class Broken(nn.Module):
    def forward(self, x):
        raise RuntimeError("mat1 and mat2\ncannot be multiplied")


class Late(nn.Linear):
    def forward(self, x):
        if not hasattr(self, "head"):
            self.head = nn.Linear(4, 4)
        return self.head(super().forward(x))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": (torch.randn(40, 3), torch.arange(40) % 7)}, "class number 6, but .* 4 classes"),
        (
            {"train": (torch.randn(40, 3), torch.zeros(40, dtype=torch.int))},
            "only the class number 0",
        ),
        ({"train": (torch.randn(40, 3), torch.full((40,), -100))}, "no class number, only -100"),
        ({"train": [(torch.randn(3), i) for i in range(12)]}, "number 11, but .* 4 classes"),
        (
            {"model": Broken},
            r"prediction of the first.*test_program.py:\d+: RuntimeError: mat1 and mat2$",
        ),
        ({"model": lambda: 3}, "model.. returned a int"),
        ({"model": lambda: nn.DataParallel(net())}, "a DataParallel: a trial fits one device"),
        ({"model": lambda: nn.LazyLinear(4)}, "weight has no shape yet"),
        ({"model": lambda: Late(3, 4)}, "the model makes head.weight when it first runs"),
        ({"model": lambda: nn.Linear(3, 4).requires_grad_(False)}, "nothing to train"),
        ({"model": infinite}, "the loss of the first examples is nan"),
        ({"model": lambda: nn.Unflatten(1, (3, 1, 1))}, "does not fit class numbers"),
    ],
)
def test_check_tries_model_data_and_loss(changes, said):
    with pytest.raises(ProgramError, match=said) as caught:
        short(**changes).check()
    assert "\n" not in str(caught.value)


# --- the long form ------------------------------------------------------------------------


class Long:
    batch_size = 8
    epochs = 3
    lr = 0.1

    def model(self):
        return net()

    def data(self):
        return {"train": data()}

    def loss(self, model, batch):
        x, y = batch
        return functional.cross_entropy(model(x), y)


def test_the_long_form_measures_its_loss():
    program = adapt(Long)
    program.check()
    assert program.task == "custom"
    assert program.metric_names == ("loss",)
    model, batch = program.model().eval(), program.example_batch(10)
    parts = [program.predict(model, tuple(leaf[i : i + 4] for leaf in batch)) for i in (0, 4, 8)]
    predictions, targets = (torch.cat(part) for part in zip(*parts, strict=True))
    loss = program.metrics(predictions, targets)["loss"]
    torch.testing.assert_close(loss, program.loss(model, batch, {}))


def test_the_long_form_with_everything():
    class Full(Long):
        task = "classification"
        searched = {"temperature": (0.5, 2.0), "steps": [1, 2]}  # noqa: RUF012
        clip = 1.0
        interval_updates = 5

        def optimizer(self, model, lr):
            return torch.optim.SGD(model.parameters(), lr)

        def schedule(self, progress):
            return 1 - progress

        def loss(self, model, batch, values):
            return functional.cross_entropy(model(batch[0]) / values["temperature"], batch[1])

        def metrics(self, predictions, targets):
            return {"own": predictions.mean()}

    program = adapt(Full())
    program.check()
    assert program.metric_names == (*CLASSIFICATION, "own")
    assert isinstance(program.optimizer(net(), 0.1), torch.optim.SGD)
    assert (program.schedule(0.25), program.clip, program.interval_updates) == (0.75, 1.0, 5)
    assert program.searched == Full.searched


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": lambda self: data()}, "must return a dict with 'train'"),
        ({"data": lambda self: {"train": data(), "valid": data()}}, "did you mean 'validation'"),
        ({"data": lambda self: 1 / 0}, r"data\(\) failed: .*ZeroDivisionError"),
        ({"loss": lambda self, model, batch: torch.ones(3)}, r"returned a tensor of shape \(3,\)"),
        ({"loss": lambda self, model, batch: 1.0}, "returned 1.0"),
        ({"lr": None}, "lr=None"),
        ({"task": "ranking"}, "unknown task 'ranking'"),
    ],
)
def test_wrong_long_forms(changes, said):
    with pytest.raises(ProgramError, match=said):
        adapt(type("Wrong", (Long,), changes)).check()


def _predicting(predict, metrics=lambda self, predictions, targets: {"loss": 0.0}):
    return adapt(type("Odd", (Long,), {"predict": predict, "metrics": metrics}))


@pytest.mark.parametrize(
    ("predict", "said"),
    [
        (lambda self, model, batch: model(batch[0]), "a Tensor: it must return .predictions"),
        (lambda self, model, batch: (model(batch[0]), *batch), "a tuple of Tensor, Tensor, Tensor"),
        (lambda self, model, batch: ({"a": batch[1]}, batch[1]), "a tuple of dict, Tensor"),
        (lambda self, model, batch: (model(batch[0]), None), "a tuple of Tensor, NoneType"),
    ],
)
def test_predictions_that_are_no_pair_of_tensors_are_refused(predict, said):
    with pytest.raises(ProgramError, match=f"predict.* returned {said}"):
        _predicting(predict).check()


@pytest.mark.parametrize(
    ("measured", "said"),
    [
        ([1.0], "returned a list, not a dict"),
        ({"hits": torch.ones(3)}, r"gave 'hits' as shape \(3,\)"),
        ({"word": "good"}, "gave 'word' as 'good'"),
    ],
)
def test_metrics_that_are_no_named_numbers_are_refused(measured, said):
    program = _predicting(
        lambda self, model, batch: (model(batch[0]), batch[1]), lambda self, *pair: measured
    )
    with pytest.raises(ProgramError, match=said):
        print(program.metric_names)


# --- files --------------------------------------------------------------------------------

IMPORTS = "import torch\nfrom torch import nn\nimport droptune\n\n"
MODEL = """\
class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(3, 4), nn.Dropout(0.1))

"""
PROGRAM = (
    "program = droptune.classification(model=Net, train=(torch.randn(40, 3), torch.arange(40) % 4),"
    " batch_size=8, epochs=1, lr=0.1)\n"
)


@pytest.fixture
def project(tmp_path):
    (tmp_path / "droptune.toml").touch()

    def write(text, name="mine.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return tmp_path

    return write


def test_a_file_with_a_program(project):
    root = project(IMPORTS + MODEL + PROGRAM)
    assert load_program("mine.py", root).epochs == 1
    assert load_program("mine.py:program", root) is load_program(str(root / "mine.py"), root)


def test_a_module_of_a_package_and_files_beside_it(project):
    project("", "pack/__init__.py")
    project("SIZE = 3\n", "pack/beside_it.py")
    root = project(IMPORTS + MODEL + "from beside_it import SIZE\n" + PROGRAM, "pack/mine.py")
    assert load_program("pack/mine.py", root).epochs == 1
    assert load_program("pack.mine:program", root).epochs == 1


def test_a_long_form_under_any_name(project):
    root = project(
        """
        class Mine:
            batch_size, epochs, lr = 4, 7, 0.1
            def model(self): ...
            def data(self): ...
            def loss(self, model, batch): ...
        """
    )
    assert load_program("mine.py", root).epochs == 7
    assert load_program("mine.py:Mine", root).epochs == 7


def test_a_bare_model_will_do_for_sites(project):
    root = project(IMPORTS + MODEL)
    assert isinstance(load_program_or_model("mine.py", root)(), nn.Sequential)
    assert isinstance(load_program_or_model("mine.py:Net", root)(), nn.Sequential)
    with pytest.raises(ProgramError, match="has no program: write one:"):
        load_program("mine.py", root)


def test_the_skeleton_names_the_models_of_the_file(project):
    root = project(IMPORTS + MODEL + "class Deeper(Net):\n    pass\n")
    with pytest.raises(ProgramError, match="model=Deeper"):
        load_program("mine.py", root)
    with pytest.raises(ProgramError, match=r"several: Net, Deeper; name one: mine.py:Net"):
        load_program_or_model("mine.py", root)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("for _ in range(3):\n    loss.backward()\n", 2),
        ("while True:\n    optimizer.step()\n", 2),
        ("def train():\n    optimizer.step()\ndef main():\n    train()\nmain()\n", 5),
        ("trainer.fit(model, data)\n", 1),
        ("if True:\n    trainer.train()\n", 2),
        ("with open('x') as f:\n    study.optimize(objective)\n", 2),
        ("result = trainer.fit(model)\n", 1),
    ],
)
def test_a_file_that_would_train_is_refused_before_it_runs(project, text, line):
    root = project("raise SystemExit('it ran')\n" + text)
    with pytest.raises(ProgramError, match=rf"mine.py:{line + 1} would start training") as caught:
        load_program("mine.py", root)
    assert "program = droptune.classification(" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "if __name__ == '__main__':\n    loss.backward()\n",
        "def train(loss):\n    loss.backward()\n",
        "class T:\n    def fit(self, loss):\n        loss.backward()\n",
        "from sklearn.preprocessing import StandardScaler\nStandardScaler().fit([[1.0], [2.0]])\n",
        "f = lambda loss: loss.backward()\n",
        "net = nn.Linear(1, 1)\nnet.train()\n",
    ],
)
def test_files_that_only_could_train_are_loaded(project, text):
    root = project(IMPORTS + MODEL + text + PROGRAM)
    assert load_program("mine.py", root).epochs == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = (\n", r"mine.py:1: SyntaxError"),
        ("import torch\n1 / 0\n", r"mine.py:2: ZeroDivisionError: division by zero$"),
        ("import no_such_module\n", r"mine.py:1: ModuleNotFoundError: No module named"),
        ("import sys\nsys.exit('usage: …')\n", r"mine.py:2: SystemExit: usage"),
        (IMPORTS + MODEL + PROGRAM.replace("lr=0.1", "lr=-1"), r"mine.py:9: lr=-1: it must"),
        ("raise ValueError('one\\ntwo')\n", r"mine.py:1: ValueError: one$"),
    ],
)
def test_errors_in_the_file_are_one_line_with_its_place(project, text, said):
    with pytest.raises(ProgramError, match=said) as caught:
        load_program("mine.py", project(text))
    assert "\n" not in str(caught.value)


def test_references_that_lead_nowhere(project, tmp_path):
    root = project(IMPORTS + MODEL + PROGRAM)
    project("", "long.py")
    for reference, said in {
        "nothing.py": r"no program file .* \(possible: long.py, mine.py\)",
        "mime.py": r"no program file .*mime.py \(did you mean 'mine.py'",
        "mine.py:progam": r"has no 'progam' \(did you mean 'program'",
        "no.such.module": "no module no.such.module under",
        "mine.txt/x": "give file.py",
        "../mine.py": "lies outside the project",
    }.items():
        with pytest.raises(ProgramError, match=said) as caught:
            load_program(reference, root)
        assert "\n" not in str(caught.value)


# --- fingerprints -------------------------------------------------------------------------


def test_the_fingerprint_follows_imports_under_the_root(project):
    project("import torch\nSIZE = 3\n", "beside.py")
    project("def late():\n    import deep.er\n", "later.py")
    project("", "deep/__init__.py")
    project("from . import sibling\n", "deep/er.py")
    project("", "deep/sibling.py")
    project("", "unused.py")
    root = project(IMPORTS + "from beside import SIZE\nimport later\n" + MODEL + PROGRAM)
    before = fingerprint("mine.py", root)
    expected = ["beside.py", "deep/__init__.py", "deep/er.py", "deep/sibling.py"]
    assert list(before) == [*expected, "later.py", "mine.py"]
    project("SIZE = 4\n", "beside.py")
    after = fingerprint("mine.py", root)
    assert [name for name in before if before[name] != after[name]] == ["beside.py"]


def test_the_root_is_the_nearest_marked_folder(tmp_path):
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    assert project_root(inner / "x.py") == inner
    (tmp_path / "a" / "droptune.toml").touch()
    assert project_root(inner / "x.py") == tmp_path / "a"
    (inner / ".git").mkdir()
    assert project_root(inner / "x.py") == inner
