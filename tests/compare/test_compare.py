"""`kfoc compare`: its numbers against dense algebra, its report as HTML, its errors."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
from base64 import b64decode
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO, StringIO
from pathlib import Path

import pytest
import torch
from torch import nn

import kfoc
import oracle
from documents import code_blocks
from models import batches, convolutional, images

pytest.importorskip("typer")
pytest.importorskip("matplotlib")

from matplotlib.image import imread
from rich.console import Console
from typer.testing import CliRunner

from kfoc.compare import charts, pictures, style
from kfoc.compare.convergence import Curve, prefixes, sample_counts
from kfoc.compare.factory import CompareError, Subject, load, subject
from kfoc.compare.looks import LOOKS
from kfoc.compare.measure import ESTIMATORS, Entry, Layer, Options, Study, measure, repeatable
from kfoc.compare.report import page
from kfoc.compare.table import overview, show
from kfoc.compare.timed import timed
from kfoc.compare.words import measured
from kfoc.reproduce.cli import app

EVERY = Options(tuple(ESTIMATORS), probes=100)
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
VOID = {"meta", "link", "br", "img"}


@pytest.fixture(scope="module")
def study() -> Study:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    model, (x, y) = convolutional(), images(60)
    return measure(Subject(model, batches(x, y, 20), {"fisher": "exact"}), EVERY, "net.py:make")


def odd_names() -> Study:
    """Layers whose names are markup."""
    model = nn.ModuleDict({"<x>&": nn.Linear(3, 4), "'\"</code><script>": nn.Linear(4, 2)})
    arguments = {"predict": lambda m, x: m["'\"</code><script>"](torch.tanh(m["<x>&"](x)))}
    data = [(torch.randn(8, 3), torch.randint(2, (8,))) for _ in range(3)]
    return measure(Subject(model, data, arguments), Options(), "<i>&amp;:f")


def test_errors_are_those_of_dense_matrices(study: Study) -> None:
    torch.manual_seed(0)
    model, (x, y) = convolutional(), images(60)
    cotangents = oracle.categorical_exact(model(x).detach())
    for layer in study.layers:
        module = model[int(layer.name)]
        fisher = dense_fisher(model, module, x, cotangents)
        o, i = layer.shape
        best = oracle.optimum(fisher, o, i)[2]
        for name, entry in layer.entries.items():
            found = kfoc.fit(
                model,
                batches(x, y, 20),
                fisher="exact",
                estimator=ESTIMATORS[name].estimator,
                layers=[layer.name],
            )
            error = oracle.relative_error(fisher, found[layer.name].to_dense())
            assert entry.error == pytest.approx(error, abs=4 * entry.standard_error + 1e-6)
        optimum = layer.entries["optimum"]
        assert optimum.error == pytest.approx(best, abs=4 * optimum.standard_error + 1e-6)


def test_errors_against_the_fisher_itself_where_labels_are_drawn(study: Study) -> None:
    """Noise of the draws is no part of them; without draws they are the same, and not shown."""
    assert not study.drawn
    out = StringIO()
    show(study, Console(file=out, width=120))
    assert "Fisher itself" not in out.getvalue()
    model, (x, y) = convolutional(), images(60)
    options = replace(EVERY, estimators=("kfac", "kfoc"), curves=False, pictures=False)
    found = measure(Subject(model, batches(x, y, 20), {}), options)
    cotangents = oracle.categorical_exact(model(x).detach())
    for layer in found.layers:
        fisher = dense_fisher(model, model[int(layer.name)], x, cotangents)
        for name, entry in layer.entries.items():
            estimator = ESTIMATORS[name].estimator
            block = kfoc.fit(model, batches(x, y, 20), estimator=estimator)[layer.name]
            error = oracle.relative_error(fisher, block.to_dense())
            # Of 60 samples, the standard error is itself a coarse estimate.
            close = 0.03 + 3 * entry.fisher_error_std
            assert entry.fisher_error == pytest.approx(error, abs=close)
            assert 0 < entry.fisher_error_std < 0.2
    show(found, Console(file=out, width=120))
    entry = found.layers[0].entries["kfac"]
    shown = f"{entry.fisher_error:.3f} ± {entry.fisher_error_std:.3f}"
    assert "Fisher itself" in out.getvalue()
    assert shown in out.getvalue()
    assert f"<td>{entry.fisher_error:.4f}</td><td>{entry.fisher_error_std:.4f}</td>" in page(found)


def dense_fisher(
    model: nn.Module, module: nn.Module, x: torch.Tensor, cotangents: torch.Tensor
) -> torch.Tensor:
    """The mean Fisher of `[W | b]`, one backward pass for each sample and direction."""
    parameters = [module.weight, module.bias]
    fisher: torch.Tensor | float = 0.0
    for sample in range(len(x)):
        output = model(x[sample : sample + 1])
        for cotangent in cotangents[:, sample : sample + 1]:
            weight, bias = torch.autograd.grad(output, parameters, cotangent, retain_graph=True)
            row = torch.cat([weight.flatten(1), bias[:, None]], 1).flatten()
            fisher = fisher + torch.outer(row, row) / len(x)
    return fisher


def test_costs_and_order(study: Study) -> None:
    for layer in study.layers:
        (o, i), entries = layer.shape, layer.entries
        assert entries["diagonal"].numbers == o * i
        assert entries["kfac"].numbers == entries["kfoc"].numbers == o * o + i * i
        assert entries["ekfoc"].numbers == o * o + i * i + o * i
        assert entries["kfoc"].bytes == 8 * entries["kfoc"].numbers
        assert entries["ekfoc"].error <= entries["kfoc"].error + 1e-9
        assert entries["ekfac"].error <= entries["kfac"].error + 1e-9
        assert layer.entries[study.closest(layer)[0]].error == min(
            e.error for e in entries.values()
        )
    for name, seconds in study.seconds.items():
        by_layer = [layer.entries[name].seconds for layer in study.layers]
        assert all(spent > 0 for spent in by_layer)
        assert sum(by_layer) < seconds
    assert study.num_samples == 60
    assert study.first_batch == 20


def test_timing_changes_nothing() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    data = [(torch.randn(8, 5), torch.randint(3, (8,))) for _ in range(3)]
    for base in (kfoc.Diagonal(), kfoc.EigenCorrected(kfoc.KFOC("exact", buffer=0))):
        for options in ({}, {"memory_budget": 10_000_000}):
            seconds: dict[str, float] = {}
            found = kfoc.fit(model, data, estimator=timed(base, seconds), **options)
            expected = kfoc.fit(model, data, estimator=base, **options)
            assert set(seconds) == set(found) == {"0", "2"}
            assert all(spent > 0 for spent in seconds.values())
            for name, block in expected.items():
                assert torch.equal(found[name].to_dense(), block.to_dense())


def test_clocked_estimators_do_all_that_theirs_do() -> None:
    """Whatever a fit asks of an estimator, by methods that there are today or that come."""
    base = kfoc.KFOC(rank=2)
    clocked = timed(base, {})
    assert type(clocked) is kfoc.KFOC
    assert clocked == base
    assert set(dir(clocked)) == set(dir(base))


def test_a_memory_budget_is_kept_to() -> None:
    """The layers are fitted in groups: more passes, the same numbers, and times of all layers."""
    model, (x, y) = convolutional(), images(40)
    one, many = (
        measure(Subject(model, batches(x, y, 10), {"fisher": "exact"} | budget), Options(), "")
        for budget in ({}, {"memory_budget": 10_000_000})
    )
    assert [layer.name for layer in one.layers] == [layer.name for layer in many.layers]
    for first, second in zip(one.layers, many.layers, strict=True):
        for name, entry in first.entries.items():
            assert second.entries[name].error == pytest.approx(entry.error, rel=1e-9)
            assert second.entries[name].seconds > 0


def test_curves(study: Study) -> None:
    for layer in study.layers:
        assert layer.by_step is not None
        assert list(layer.by_step.y) == sorted(layer.by_step.y, reverse=True)
        assert set(layer.by_samples) == {"diagonal", "kfac", "kfoc"}
        assert layer.by_samples["kfac"].x == (20.0,)


def test_steps_by_the_singular_values_of_the_rearranged_fisher() -> None:
    """After k half steps from the identity, sigma is the norm of that power of A on it."""
    model, (x, y) = convolutional(), images(20)
    subject = Subject(model, [(x, y)], {"fisher": "exact", "layers": ["3"]})
    layer = measure(subject, Options(("kfoc",)), "").layers[0]
    assert layer.by_step is not None
    fisher = dense_fisher(model, model[3], x, oracle.categorical_exact(model(x).detach()))
    o, i = layer.shape
    matrix = oracle.rearranged(fisher, o, i)
    sigma = torch.linalg.svdvals(matrix)[0]
    vector, reached = matrix @ torch.eye(i).flatten(), {}
    for step in range(1, 13):
        image = (matrix if step % 2 == 0 else matrix.mT) @ (vector / vector.norm())
        reached[step], vector = image.norm(), image
    for step, left in zip(*layer.by_step, strict=True):
        assert left == pytest.approx((1 - reached[int(step)] / sigma).item(), rel=1e-3, abs=1e-12)


def test_distance_is_the_dense_one() -> None:
    model, (x, y) = convolutional(), images(40)
    data = batches(x, y, 20)
    whole = kfoc.fit(model, data, estimator=kfoc.KFAC())
    first = kfoc.fit(model, data[:1], estimator=kfoc.KFAC())
    curves = sample_counts(lambda part: kfoc.fit(model, part, estimator=kfoc.KFAC()), data, whole)
    for name in whole:
        a, b = first[name].to_dense(), whole[name].to_dense()
        assert curves[name] == ((20,), (pytest.approx(((a - b).norm() / b.norm()).item()),))
    assert prefixes(10) == [1, 2, 5]
    assert prefixes(1) == []


def test_the_model_and_the_state_come_back() -> None:
    model, (x, y) = convolutional().train(), images(12)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    state = torch.get_rng_state()
    measure(Subject(model, [(x, y)]), Options(("kfoc",)), "")
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", [kfoc.KFAC(), kfoc.Diagonal(), kfoc.EigenCorrected()])
def test_spectrum_is_that_of_the_dense_block(kind: kfoc.Estimator) -> None:
    model, (x, y) = convolutional(), images(30)
    for block in kfoc.fit(model, [(x, y)], estimator=kind).values():
        found = pictures.spectrum(block)
        assert found is not None
        dense = torch.linalg.eigvalsh(block.to_dense()).flip(0)
        ranks = torch.tensor(found.x).long()
        torch.testing.assert_close(
            torch.tensor(found.y), dense[ranks - 1], rtol=1e-6, atol=1e-12 * dense[0].item()
        )


def test_spectrum_of_groups() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.LazyLinear(2))
    x = torch.randn(10, 4, 5, 5)
    model(x)
    block = kfoc.fit(model, [(x, None)])["0"]
    found = pictures.spectrum(block)
    assert found is not None
    assert found.y[0] == pytest.approx(torch.linalg.eigvalsh(block.to_dense())[-1].item())
    assert "group 1 of 2" in pictures.heatmaps(block)[0].name


def test_png_decodes_to_what_was_drawn() -> None:
    matrix = torch.tensor([[4.0, -1.0, 0.0], [1.0, -4.0, 2.0]])
    content = b64decode(charts.image(pictures.heatmap("m", matrix).pixels).partition(",")[2])
    pixels = (torch.tensor(imread(BytesIO(content))) * 255).round().int()
    assert pixels[..., 3].tolist() == [[255, 128, 0], [128, 255, 180]]
    assert pixels[0, 0, :3].tolist() == list(charts.POSITIVE)
    assert pixels[1, 1, :3].tolist() == list(charts.NEGATIVE)
    assert set(pictures.heatmap("zero", torch.zeros(2, 2)).pixels.flatten().tolist()) == {0}


def test_large_matrices_are_means_of_blocks() -> None:
    matrix = torch.randn(128, 192)
    expected = matrix.view(64, 2, 64, 3).mean((1, 3))
    torch.testing.assert_close(pictures.reduced(matrix), expected)


class Reader(HTMLParser):
    """Checks that elements close in order, and collects text and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


def test_report_is_well_formed_and_complete(study: Study) -> None:
    text = page(study)
    reader, shown = read(text), re.sub("<[^>]*>", "", text)
    for layer in study.layers:
        assert reader.text.count(layer.name) >= 3
        for entry in layer.entries.values():
            assert f"{entry.error:.4f}" in shown
    assert not re.search(r"https?:|url\(|@import|<script|nan|Infinity", text)
    sources = [attributes["src"] for tag, attributes in reader.tags if tag == "img"]
    assert len(sources) == 3 * (1 + 2 + 2 + 1 + 1 + 2)
    assert all(source and source.startswith("data:image/png;base64,") for source in sources)
    assert all(attributes.get("alt") for tag, attributes in reader.tags if tag == "img")
    assert all(attributes.get("aria-label") for tag, attributes in reader.tags if tag == "svg")
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert len(text) < 400_000


def test_charts_are_text_in_the_font_and_the_colours_of_the_page(study: Study) -> None:
    drawings = re.findall("<svg.*?</svg>", page(study))
    assert len(drawings) == 3 * (1 + 3)
    for drawing in drawings:
        assert not re.search(r"font-family|font:", drawing)
        assert set(re.findall(r"#[0-9a-f]{6}", drawing)) <= {colour for colour, _ in LOOKS.values()}
        assert set(re.findall(r"var\(--(\w+)\)", drawing)) <= set(style.LIGHT)
    assert set(style.LIGHT) == set(style.DARK)
    for label, entry in zip(study.labels.values(), study.layers[0].entries.values(), strict=True):
        assert f">{label}</text>" in drawings[0]
        assert f">{measured(entry.error, entry.standard_error)}</text>" in drawings[0]
    for word in ("rank", "half steps", "samples"):
        assert any(f">{word}</text>" in drawing for drawing in drawings)


def test_bars_are_as_long_as_their_values() -> None:
    entries = {"K-FAC": (0.5, 0.1), "K-FOC": (3.0, math.nan)}
    text = charts.bars(entries, 2.0, "t")
    ends = re.findall(r'd="M 64 [\d.]+ L ([\d.]+) [^"]*" style="fill: (#\w+)', text)
    assert [(name, float(end)) for end, name in ends] == [("#d55e00", 104.0), ("#0072b2", 224.0)]
    assert ">3.000</text>" in text
    assert re.search(r'd="M 96 [\d.]+ L 112 ', text)  # the whisker


def test_names_are_escaped() -> None:
    study = odd_names()
    text = page(study)
    reader = read(text)
    assert "<script" not in text.lower()
    assert "<x>&" in reader.text
    assert "'\"</code><script>" in reader.text
    assert "<i>&amp;:f" in reader.text
    out = StringIO()
    show(study, Console(file=out, width=120))
    assert "<x>&" in out.getvalue()


def test_report_without_standard_error(study: Study) -> None:
    """One probe has no spread: no "nan" in a chart or table."""
    unknown = dict.fromkeys(("standard_error", "fisher_error", "fisher_error_std"), math.nan)
    entry = replace(study.layers[0].entries["kfac"], **unknown)
    layer = replace(study.layers[0], entries={"kfac": entry}, by_samples={})
    text = page(replace(study, layers=(layer,), labels={"kfac": "K-FAC"}, seconds={"kfac": 1.0}))
    assert "nan" not in text
    assert measured(math.nan, math.nan) == "–"


@pytest.mark.parametrize("palette", [style.LIGHT, style.DARK])
def test_contrast(palette: dict[str, str]) -> None:
    """WCAG: 4.5 for text, 3 for what is drawn."""
    for name in ("ink", "soft"):
        assert contrast(palette[name], palette["page"]) >= 4.5
    for kind in ESTIMATORS.values():
        assert contrast(LOOKS[kind.label][0], palette["page"]) >= 3


def test_every_method_has_a_colour_and_a_marker_of_its_own() -> None:
    for each in zip(*LOOKS.values(), strict=True):
        assert len(set(each)) == len(LOOKS)


def contrast(first: str, second: str) -> float:
    low, high = sorted(map(luminance, (first, second)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_lines_of_one_point_and_of_wide_ranges() -> None:
    for x, y in (((20.0,), (0.5,)), ((1, 1e7), (1e-30, 1e5)), ((1, 2), (1e-5, 1.02e-5))):
        text = charts.lines({"K-FAC": Curve(x, y)}, "x", "t")
        read(text)
        assert text.count("</text>") > 3
    assert ">10⁻²" in charts.lines({"": Curve((1, 1e7), (1e-30, 1))}, "x", "t")


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium")
@pytest.mark.parametrize("width", [360, 390, 1200])
def test_in_a_browser(study: Study, tmp_path: Path, width: int) -> None:
    """In a frame of so many pixels: nothing overflows, nothing is fetched, nothing complained of.

    The frame, because a window of the browser cannot be made that narrow.
    """
    long = replace(study.layers[0], name="encoder.layers." * 12 + "<x>&")
    text = page(replace(study, layers=(*study.layers, long)))
    script = """<script>onload = () => {
      const inner = document.querySelector('iframe').contentDocument, root = inner.documentElement;
      const fetched = document.querySelector('iframe').contentWindow.performance
        .getEntriesByType('resource').filter(e => !e.name.startsWith('data:'));
      const cut = [...inner.querySelectorAll('svg text')].filter(t => {
        const a = t.getBoundingClientRect(), b = root.getBoundingClientRect();
        return a.width && (a.left < b.left || a.right > b.right); });
      document.body.dataset.result = JSON.stringify({visible: root.clientWidth,
        width: root.scrollWidth, fetched: fetched.length, cut: cut.length,
        images: [...inner.images].every(i => i.complete && i.naturalWidth)}); };</script>"""
    frame = f'<iframe srcdoc="{html.escape(text)}" style="border:0;width:{width}px;height:900px">'
    path = tmp_path / "frame.html"
    path.write_text(f"<!DOCTYPE html><body>{frame}</iframe>{script}", encoding="utf-8")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--enable-logging=stderr",
        "--v=0",
    ]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000"]
    done = subprocess.run(
        [CHROMIUM, *flags, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120
    )
    result = json.loads(html.unescape(re.findall(r'data-result="([^"]*)"', done.stdout)[0]))
    expected = {"fetched": 0, "cut": 0, "images": True}
    assert result == {"visible": width, "width": width, **expected}
    assert "CONSOLE" not in done.stderr


FACTORY = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    data = [(torch.randn(5, 3), torch.randn(5, 2)) for _ in range(3)]
    return model, data, {"likelihood": "gaussian", "layers": ["0"]}

def needy(path):
    return None

def broken():
    return 3

value = 3
"""


def test_command(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(FACTORY)
    out, numbers = tmp_path / "r.html", tmp_path / "r.json"
    arguments = ["compare", f"{tmp_path / 'net.py'}:make", "--out", str(out), "--json"]
    arguments += [str(numbers), "--estimators", "kfac, ekfoc", "--batches", "2", "--seed", "3"]
    result = CliRunner().invoke(app, [*arguments, "--layers", "*", "--fisher", "exact"])
    assert result.exit_code == 0, result.output
    assert "EK-FOC" in result.output
    content = json.loads(numbers.read_text())
    assert [layer["name"] for layer in content["layers"]] == ["0", "2"]
    assert content["num_samples"] == 10
    assert content["settings"]["likelihood"] == "gaussian"
    assert content["settings"]["seed"] == "3"
    assert list(content["seconds"]) == ["kfac", "ekfoc"]
    assert "Curvature estimators compared" in out.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("net.py", [], "expected MODULE:FACTORY"),
        ("gone.py:make", [], "there is no file"),
        ("no_such_module_here:make", [], "there is no module 'no_such_module_here'"),
        ("torch.no_such:make", [], "there is no module 'torch.no_such'"),
        ("net.py:mak", [], "has no 'mak'; what it defines and can be called: make, needy, broken"),
        ("net.py:value", [], "must be a function, found int"),
        (
            "net.py:needy",
            [],
            "without arguments: missing a required argument: 'path'",
        ),
        ("net.py:broken", [], "must return (model, data)"),
        ("net.py:make", ["--estimators", "kfak"], "estimators must be some of diagonal"),
        ("net.py:make", ["--estimators", ""], "found none"),
        ("net.py:make", ["--probes", "0"], "--probes"),
        ("net.py:make", ["--batches", "0"], "--batches"),
        ("net.py:make", ["--out", "gone/r.html"], "there is no folder"),
        ("net.py:make", ["--out", "."], "is a folder"),
        ("net.py:make", ["--fisher", "some"], "fisher must be"),
    ],
)
def test_mistakes(
    target: str,
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "net.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["compare", target, *options])
    assert result.exit_code == 2
    assert message in result.output
    assert not list(tmp_path.glob("*.html"))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda m: m, "found Linear"),
        (lambda m: (m,), "a tuple of 1"),
        (lambda m: (3, []), "must be a torch.nn.Module, found int"),
        (lambda m: (m, 3), "iterable of batches"),
        (lambda m: (m, [], 3), "arguments must be a dict, found int"),
        (lambda m: (m, [], {"probes": 3}), "does not take here: probes"),
        (lambda m: (m, [], {"checkpoint": "run"}), "does not take here: checkpoint"),
    ],
)
def test_wrong_return_values(returned: Callable[[nn.Module], object], message: str) -> None:
    with pytest.raises(CompareError, match=re.escape(message)):
        subject(returned(nn.Linear(2, 2)), "net:make")


def test_data_is_the_same_on_every_pass() -> None:
    pairs = [(torch.randn(2, 3), torch.zeros(2)) for _ in range(3)]
    assert repeatable(pairs, None) is pairs
    assert len(list(repeatable(iter(pairs), None))) == 3
    assert repeatable(pairs, 2) == pairs[:2]
    shuffled = torch.utils.data.DataLoader(pairs, shuffle=True)
    with pytest.raises(CompareError, match="shuffle=False"):
        repeatable(shuffled, None)
    with pytest.raises(CompareError, match="no batch"):
        measure(Subject(nn.Linear(2, 2), []), Options(), "")


def test_example() -> None:
    torch.set_default_dtype(torch.float32)
    example = load(str(Path(__file__).parents[2] / "examples/compare_factory.py") + ":digits")
    study = measure(example, Options(curves=False, pictures=False), "")
    for layer in study.layers:
        assert layer.entries["kfoc"].error < layer.entries["kfac"].error
    assert "Images of factors" not in page(study)


def test_document() -> None:
    scope: dict = {}
    exec(code_blocks("docs/compare.md")[0], scope)
    assert len(list(subject(scope["factory"](), "docs").data)) == 10


def test_ties_and_diagonals_in_place_of_factors_are_marked() -> None:
    def entry(error: float, structure: str = "Kronecker") -> Entry:
        return Entry(error, 0.01, error, 0.01, 0.1, 5, 40, "", 2, True, structure)

    names = "diagonal", "kfac", "kfoc"
    rows = {
        "first": (entry(0.9, "Diagonal"), entry(0.5), entry(0.4)),
        "second": (entry(0.9, "Diagonal"), entry(0.4002), entry(0.4)),
        "large": (entry(0.7, "Diagonal"), entry(0.7, "Diagonal"), entry(0.7, "Diagonal")),
    }
    layers = tuple(
        Layer(name, (2, 3), dict(zip(names, each, strict=True))) for name, each in rows.items()
    )
    labels = dict(zip(names, ("diagonal", "K-FAC", "K-FOC"), strict=True))
    study = Study("", {}, labels, dict.fromkeys(names, 1.0), layers, {}, 4, 2)
    assert [study.closest(layer) for layer in layers] == [("kfoc",), ("kfoc", "kfac"), names]
    assert {name: cells[2] for name, cells in overview(study).items()} == {
        "diagonal": "0 of 3, 1 tied",
        "kfac": "0 of 3, 2 tied",
        "kfoc": "1 of 3, 2 tied",
    }
    console = Console(width=100, file=StringIO(), force_terminal=True)
    show(study, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.count("◇") == 2 + 1  # K-FAC and K-FOC of the last layer; and what it means
    lines = {line.split()[0]: line for line in text.splitlines()[::-1] if line.strip()}
    assert lines["second"].count("\x1b[1m") == 2
    assert lines["first"].count("\x1b[1m") == 1
