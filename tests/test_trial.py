"""The trial of a network of the user's own: whatever would make its run wrong, or its checkpoint useless, is refused."""
import gc
import random
import weakref

import numpy as np
import pytest
import torch
from test_custom_network import LINEAR, NETWORKS, write

import metasemi
from models import NetworkError, build_model
from utils.trial import try_network

CPU = torch.device("cpu")


@pytest.fixture
def net(tmp_path):
    """net(body): the name of a class Net with that body, in a file."""
    return lambda body: write(tmp_path, body)


KEPT = """
        self.head = nn.Linear(768, num_classes)
        MADE

    def forward(self, x):
        y = self.head(x.flatten(1))
        USED
        return y
"""


def kept(made, used="pass", more=""):
    """The body of a network that makes something, uses it, and has further methods."""
    return KEPT.replace("MADE", made).replace("USED", used) + "".join(f"\n    {line}\n" for line in more.splitlines())


MERGING = kept("self.a, self.b = nn.Parameter(torch.randn(num_classes, 2)), nn.Parameter(torch.randn(2, 768))",
               "y = y + self.training * (x.flatten(1) @ (self.a @ self.b).T)", """def train(self, mode=True):
    if mode != self.training:
        self.head.weight.data += (-1 if mode else 1) * (self.a @ self.b).detach()
    return super().train(mode)""")
LEFT_OUT = """def state_dict(self, *args, **options):
    return {name: w for name, w in super().state_dict(*args, **options).items() if name != "scale"}"""
SHAPES = "gives 9 logits for an image: expected one for each of 10 classes"


@pytest.mark.parametrize(("body", "message"), [
    (LINEAR + "logits[:, 1:]", SHAPES),
    (LINEAR + "(logits,)", "gives a tuple for 4 examples in evaluation mode"),
    (LINEAR + "logits[:, 0] if self.training else logits", "gives the shape (4,) for 4 examples in training mode"),
    (LINEAR + "self.head(x)", "line 13: RuntimeError"),
    (LINEAR + "logits.detach()", "fails in a step of training: RuntimeError: element 0 of tensors does not require grad"),
    (LINEAR.replace("x.flatten(1)", "x.relu_().flatten(1)") + "logits", "changes its input in evaluation mode"),
    ("\n    def forward(self, x):\n        return x\n", "has no parameter that can be trained"),
    ("        self.head = nn.LazyLinear(num_classes)\n", "has lazy layers"),
    ("        raise RuntimeError('two\\nlines')\n", "line 8: RuntimeError: two"),
    ("        exit(0)\n", "SystemExit: 0"),
    ("\n\ndef Net(num_classes):\n    return 7\n", "made a int: expected a torch.nn.Module"),
    ("\n\nimport nothing_of_this\n", "ModuleNotFoundError: No module named 'nothing_of_this'"),
    ("\n\ndel Net\n", "has no attribute 'Net'"),
    (kept("self.w = nn.Parameter(torch.ones(2) * 1j)", "y = y + (self.w * self.w).real.sum()"), "floating point Tensors"),
    (kept("self.w = nn.Parameter(torch.eye(3).to_sparse())"), "SparseCPU"),
    (kept("self.e = nn.Embedding(4, num_classes, sparse=True)", "y = y + self.e((x.flatten(1)[:, 0] > 0).long())"),
     "the gradient of e.weight is sparse: make its embedding"),
    (kept("pass", "pass", "def get_extra_state(self):\n    return {'n': 1}"), "has the extra state _extra_state: "),
    (kept("self.register_buffer('b', torch.ones(1).expand(4))"), 'While copying the parameter named "b"'),
    (kept("self.register_buffer('b', None)", "self.b = torch.ones(3)"), 'Unexpected key(s) in state_dict: "b"'),
    (kept("self.register_buffer('b', torch.ones(0))", "self.b = torch.cat([self.b, x.detach().mean()[None]])"), "mismatch"),
    (kept("self.register_buffer('scale', torch.ones(1))", "y = y * self.scale", LEFT_OUT), 'Missing key(s) in state_dict: "sc'),
    (kept("self.late = []", "self.late = self.late or [nn.Linear(y.shape[1], y.shape[1])]\n        y = self.late[0](y)"),
     "gives other logits in evaluation mode once it was saved and loaded"),
    (kept("self.register_buffer('b', torch.ones(1), persistent=False)", "self.b = self.b + self.training; y = y * self.b"),
     "gives other logits in evaluation mode once it was saved and loaded, so no run could be resumed"),
    (kept("self.head.n = 0", "self.head.n += self.training\n        y = y * (1 + self.training * self.head.n)"),
     "gives other logits in training mode once it was saved and loaded, so no run could be resumed"),
    (kept("self.scale = 1", "y = y * self.scale", """def load_state_dict(self, *args, **options):
    del self.scale"""), "fails in evaluation mode once it was saved and loaded: "),
    (MERGING, "train(False) of the model changes head.weight")])
def test_a_network_that_cannot_be_trained_or_resumed_is_one_line_and_writes_nothing(
        train, tmp_path, net, capsys, body, message):
    for flags, words in (["--no-meta"], message), ([], ""):
        assert train("a", "-a", net(body), *flags) == 2
        error = capsys.readouterr().err
        assert f"argument --arch: {tmp_path / 'net.py'}:Net" in error and words in error and error.count("\n") == 1, error
        assert [path.name for path in tmp_path.iterdir()] == ["net.py"]


@pytest.mark.parametrize("body", [
    kept("self.register_buffer('seen', torch.ones(1), persistent=False)", "self.seen = self.seen + self.training"),
    kept("pass", "y = y if self.training else x.flatten(1) @ self.cached", """def train(self, mode=True):
    self.cached = None if mode else self.head.weight.detach().T.clone()
    return super().train(mode)"""),
    kept("self.register_buffer('mask', torch.full((1, 3), torch.nan))", "self.calls = getattr(self, 'calls', 0) + 1")])
def test_state_that_is_made_again_or_changes_no_answer_is_no_fault(net, body):
    assert try_network(net(body), 10, 16, CPU) == []


def test_the_method_the_consistency_loss_and_the_batch_of_the_run_are_checked_and_an_error_is_one_line(net, monkeypatch):
    name = net(LINEAR + "logits")

    def run(error):
        def check_model(model, x_l, y_l, x_u, method, consistency, epsilon):
            assert (len(x_l), len(y_l), len(x_u), method, consistency, epsilon) == (3, 3, 3, "unrolled", "kl", 0.02)
            raise error
        monkeypatch.setattr(metasemi, "check_model", check_model)
        with pytest.raises(NetworkError) as caught:
            try_network(name, 10, 16, CPU, method="unrolled", consistency="kl", epsilon=0.02, batch=3)
        return str(caught.value)

    assert run(ValueError("the weight w is hidden")) == f"{name}: the weight w is hidden"
    assert run(RuntimeError("out of luck")) == f"{name} fails in the check of its meta-gradient: RuntimeError: out of luck"


NOISY = kept("pass", "y = nn.functional.dropout(y, 0.5)")
NOISY_INPUT = kept("pass", "y = y + self.head(torch.rand_like(x).flatten(1))")
CUT = kept("pass", "y = y + self.head(x.flatten(1)).square().detach()")
def test_a_network_whose_meta_gradient_would_be_wrong_is_refused_with_the_flag_of_a_method_that_is_right(net):
    name = net(CUT)
    with pytest.raises(NetworkError) as error:
        try_network(name, 10, 16, CPU, method="jvp")
    said = str(error.value)
    assert said.startswith(f"{name}: ") and "take --meta-gradient finite-difference" in said and "\n" not in said
    assert try_network(name, 10, 16, CPU, method="finite-difference") == []


def test_batch_normalization_over_one_value_is_refused_for_every_network(net):
    for name in (net(NETWORKS["batch norm of its own, and dropout"]), "resnet18"):
        with pytest.raises(NetworkError, match="more than 1 value per channel .*: take a larger --batch-size"):
            try_network(name, 10, 16, CPU, batch=1)
    assert try_network("convsmall", 10, 16, CPU, batch=1) == []


def test_probabilities_in_the_place_of_logits_and_foreign_random_numbers_are_one_warning(net):
    foreign, line = "draws random numbers from Python or NumPy", "y = y * float({}) if self.training else y"
    for body, words in ((LINEAR + "logits.softmax(dim=1)\n", "gives probabilities"),
                        (LINEAR + "logits if not self.training else logits.softmax(dim=1)\n", "gives probabilities"),
                        (kept("pass", "import random\n        " + line.format("random.random()")), foreign),
                        (kept("pass", "import numpy\n        " + line.format("numpy.random.rand()")), foreign)):
        warning, = try_network(net(body), 10, 16, CPU)
        assert words in warning


def test_an_evaluation_tries_the_logits_alone(net):
    body = kept("self.register_buffer('b', None)", "self.b = torch.ones(3)")
    assert try_network(net(body), 10, 16, CPU, trains=False) == []
    with pytest.raises(NetworkError, match="gives the shape"):
        try_network(net(LINEAR + "logits[1:]"), 10, 16, CPU, trains=False)


def test_a_trial_leaves_random_states_as_they_were_and_keeps_no_network(net, monkeypatch):
    made, build = weakref.WeakSet(), build_model
    monkeypatch.setattr("utils.trial.build_model", lambda *args: [made.add(model := build(*args)), model][1])

    def states():
        kind, keys, *rest = np.random.get_state()
        return torch.get_rng_state().tolist(), random.getstate(), kind, keys.tolist(), rest

    for body, fails in ((NETWORKS["batch norm of its own, and dropout"], False), (MERGING, True)):
        before = states()
        try:
            try_network(net(body), 10, 16, CPU, method="unrolled")
            assert not fails
        except NetworkError:
            assert fails
        assert states() == before
        gc.collect()
        assert not made


def test_dropout_that_is_always_on_is_refused_without_a_meta_step_too(net):
    for body in (NOISY, NOISY_INPUT, LINEAR + "logits * torch.rand(1)"):
        with pytest.raises(NetworkError, match="two passes in evaluation mode give different logits"):
            try_network(net(body), 10, 16, CPU)
