"""Analyses of small models: what is read, what batches and padding change (nothing), and the command."""

import importlib
import json
import sys
from math import isfinite
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
from tiny import REPOSITORY, copy_of, write_experiment

from unifork.analysis import alignment, gradients
from unifork.analysis.alignment import pooled_states
from unifork.analysis.gradients import conflicts
from unifork.analysis.runs import RunDocuments
from unifork.batch import IMAGE, TEXT
from unifork.cli import main
from unifork.config import Analysis, Sampling, load_eval
from unifork.documents.prompts import template_named, written
from unifork.errors import ConfigError, DataError
from unifork.evaluation.items import Item, write_items
from unifork.experiments import resolve
from unifork.library import Model
from unifork.models.modeling import UniForkModel

sys.path.insert(0, str(Path(__file__).parent.parent / "models"))
from model_samples import generation, new_model, understanding

PROMPTS = [
    f"{count} {color} {shape}"
    for count in ("one", "three hundred and twelve")
    for color in ("red", "green", "blue", "black")
    for shape in ("circle", "square", "cross", "star")
]
CHOICES = Analysis(k=4)


@pytest.fixture(scope="module")
def model(tiny_root) -> Model:
    return Model.load(tiny_root / "models/unifork-init", "cpu")


@pytest.fixture(scope="module")
def codes(model):
    config = model.engine.model.config
    shape = (2, len(PROMPTS), config.positions, config.depth)
    both = np.random.default_rng(0).integers(0, config.codebook_size, shape)
    return dict(zip(("generation", "understanding"), both, strict=True))


def documents(model, codes):
    form = template_named("generate", "test")
    return [
        alignment._masked(model.engine, "generation", written(form, text), codes_ND)
        for text, codes_ND in zip(PROMPTS, codes["generation"], strict=True)
    ]


def states(model, found, size):
    parts = [found[start : start + size] for start in range(0, len(found), size)]
    return torch.cat([pooled_states(model.engine.model, part) for part in parts], 1)


def test_the_words_of_the_prompt_and_the_positions_with_codes_are_averaged(model, codes):
    for text, (document, (image_T, text_T)) in zip(PROMPTS, documents(model, codes), strict=True):
        assert image_T.sum() == (document.kinds_T == IMAGE).sum() == model.engine.model.config.positions
        assert model.engine.tokenizer.decode(document.text_ids_T[text_T]).strip() == text
        assert (document.kinds_T[text_T] == TEXT).all()


def test_states_are_those_of_the_layers_averaged(model, codes):
    network, (document, masks_ST) = model.engine.model, documents(model, codes)[0]
    seen = []
    hooks = [
        layer.register_forward_hook(lambda _, given, out: seen.append((given[0], out))) for layer in network.layers
    ]
    found_LSC = pooled_states(network, [(document, masks_ST)])[:, 0]
    for hook in hooks:
        hook.remove()
    assert len(found_LSC) == len(network.layers) + 2
    wanted = [given for given, _ in seen] + [seen[-1][1]]
    for layer, x_TC in enumerate(wanted):
        for mask, mask_T in enumerate(torch.from_numpy(masks_ST)):
            torch.testing.assert_close(found_LSC[layer, mask], x_TC[mask_T].mean(0))


def test_batch_size_and_padding_change_nothing(model, codes):
    found = documents(model, codes)
    assert len({len(document) for document, _ in found}) > 1
    alone = states(model, found, 1)
    torch.testing.assert_close(states(model, found, 5), alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(states(model, found, len(found)), alone, rtol=1e-5, atol=1e-5)
    curves = [alignment._curves(model.engine, PROMPTS, codes, Analysis(k=4, batch=size)) for size in (1, 7, 64)]
    assert curves[0] == curves[1] == curves[2]


def test_a_model_whose_image_states_are_text_states_scores_1_at_every_layer(model, codes, monkeypatch):
    network = model.engine.model
    text_BC, batches = states(model, documents(model, codes), len(PROMPTS))[-1, :, 1], []
    hidden = UniForkModel.hidden

    def replaced(x):
        is_image_BT = batches[-1].kinds_BT == IMAGE
        x_BTC = x.view(*is_image_BT.shape, -1)
        return torch.where(is_image_BT[..., None], text_BC[:, None], x_BTC).view_as(x)

    def remembering(self, batch, cache=None):
        batches.append(batch)
        return replaced(hidden(self, batch, cache))

    monkeypatch.setattr(UniForkModel, "hidden", remembering)
    hooks = [
        layer.register_forward_pre_hook(lambda _, given: (replaced(given[0]), *given[1:])) for layer in network.layers
    ]
    try:
        curves, _ = alignment._curves(model.engine, PROMPTS, codes, Analysis(k=4, text="generation"))
    finally:
        for hook in hooks:
            hook.remove()
    assert [curve["score"] for curve in curves.values()] == [[1.0] * (len(network.layers) + 1)] * 2


def test_choices_choose(model, codes):
    found = {
        (last, text): alignment._curves(model.engine, PROMPTS, codes, Analysis(k=4, last=last, text=text))[0]
        for last in ("normed", "raw")
        for text in ("branch", "generation", "query")
    }
    assert all(curves["generation"] == found[last, "branch"]["generation"] for (last, _), curves in found.items())
    seen = [found["normed", text]["understanding"]["score"] for text in ("branch", "generation", "query")]
    assert seen[2] not in seen[:2]
    assert found["raw", "query"] != found["normed", "query"]


def test_equal_or_too_few_prompts_are_refused(model):
    with pytest.raises(ConfigError, match="'b' occurs 2 times"):
        alignment.alignment(model, ["a", "b", "b"], Sampling(), CHOICES)
    with pytest.raises(ConfigError, match="k is 4; among 4 prompts"):
        alignment.alignment(model, PROMPTS[:8], Sampling(), CHOICES)


def test_gradient_conflict_is_of_shared_matrices_and_needs_two_kinds(tiny_root, monkeypatch):
    monkeypatch.chdir(tiny_root)
    model = Model.load("models/unifork-init", "cpu")
    of = RunDocuments("unifork-s3", model, Analysis(pairs=8, documents=60))
    every = list(of.documents())
    found = conflicts(model.engine.model, every, of.choices)
    assert found["documents"] == {"understanding": 8, "generation": 8}
    assert {name.split(".")[1] for name in found["matrices"]} == {"0"}  # the fork is behind it
    assert len(found["matrices"]) == 7
    assert all(row["conflict"] == row["baseline"] - row["similarity"] for row in found["matrices"].values())
    small = conflicts(model.engine.model, every, Analysis(pairs=8, batch=1000))
    for name, row in small["matrices"].items():
        assert row == pytest.approx(found["matrices"][name], abs=1e-5)  # of eight documents both are one batch
    with pytest.raises(DataError, match=r"between images: documents of two kinds are needed, found \['with image'\]"):
        conflicts(model.engine.model, every, Analysis(between="images"))


def test_a_model_that_shares_no_layer_has_no_conflict_and_a_figure_that_says_so():
    found = conflicts(new_model("mot"), [understanding(0), generation(1)], CHOICES)
    assert found["matrices"] == {}
    assert "<svg" in gradients.figure(found, CHOICES)


def run(capsys, *words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["unifork", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
    return ended.value.code, capsys.readouterr()


@pytest.fixture(scope="module")
def root(tiny_root, tmp_path_factory):
    root = copy_of(tiny_root, tmp_path_factory.mktemp("analysis") / "root")
    copy_of(root / "models/unifork-init", root / "models/unifork-s3")
    return root


def test_the_command_from_a_checkpoint_to_numbers_and_figures(root, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(root)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    words = ("models/unifork-s3", "--pairs", 20, "--choose", "k=3", "--choose", "text=query", "--out", tmp_path)
    code, printed = run(capsys, "analyze", "alignment", *words, "--prompts", tmp_path / "prompts.txt")
    assert code == 0, printed.err
    found = json.loads((tmp_path / "alignment.json").read_text())
    assert (found["prompts"], found["prompts_are"], found["untrained"], found["fork"]) == (20, "given", {}, 1)
    assert (found["choices"]["k"], found["choices"]["text"]) == (3, "query")
    assert (tmp_path / "alignment.svg").read_text().count("<svg") == 1
    code, printed = run(capsys, "analyze", "alignment", *words, "--held-out", "--untrained", "models/unifork-init")
    assert code == 0, printed.err
    found = json.loads((tmp_path / "alignment.json").read_text())
    assert found["prompts_are"] == "rows of s3, trained on"  # the card holds none out
    assert found["untrained"] == found["curves"]  # which it is
    assert len(found["curves"]["generation"]["score"]) == 3
    for kind in ("conflict", "entropy"):
        code, printed = run(capsys, "analyze", kind, *words)
        assert code == 0, printed.err
        assert (tmp_path / f"{kind}.svg").exists()
    matrices = json.loads((tmp_path / "conflict.json").read_text())["matrices"]
    assert all(isfinite(row["conflict"]) for row in matrices.values())
    bits = json.loads((tmp_path / "entropy.json").read_text())["bits"]
    assert all(h1 >= h2 >= h3 >= 0 for h1, h2, h3 in bits.values())


@pytest.mark.slow
@pytest.mark.parametrize("gpus", [0, 1])
def test_the_stage_computes_where_the_cluster_file_says(root, tmp_path, gpus):
    root = copy_of(root, tmp_path / "root")
    for name in ("params.yaml", "experiments/tiny.yaml"):
        (root / name).unlink()  # a link to another root's
    kinds = {kind: ["s3"] for kind in ("alignment", "conflict", "entropy")}
    write_experiment(root, {"analyses": {**kinds, "pairs": 8, "k": 2, "documents": 60}})
    (root / "here.yaml").write_text(f"name: here\njobs: {{analyze: {{gpus: {gpus}}}}}\n")
    code, printed = forks.program(root, ("pipelines.analyze", "unifork-s3"), UNIFORK_CLUSTER="here.yaml")
    if gpus > torch.cuda.device_count():
        assert (code, printed) == (2, "error: here.yaml: jobs.analyze.gpus: cuda: this machine has 0 GPUs\n")
    else:
        assert code == 0, printed
        assert {path.stem for path in (root / "scores/analyses/unifork-s3").iterdir()} == kinds.keys()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("alignment",), "give either --prompts FILE, --benchmark NAME or --held-out"),
        (("alignment", "--held-out", "--benchmark", "geneval"), "give either --prompts FILE, --benchmark NAME or"),
        (("alignment", "--benchmark", "shapes-generation"), "data/evals/shapes-generation: no manifest.json"),
        (("alignmant", "--held-out"), "unknown analysis 'alignmant'"),
        (("entropy", "--run", "nobody"), "unknown run 'nobody'"),
        (("entropy", "--choose", "rows=l3"), "rows: Input should be 'l2'"),
    ],
)
def test_wrong_words_are_one_line(root, monkeypatch, capsys, words, message):
    monkeypatch.chdir(root)
    code, printed = run(capsys, "analyze", words[0], "models/unifork-s3", *words[1:], "--out", "found")
    assert (code, printed.err.count("\n")) == (2, 1)
    assert message in printed.err


def test_an_experiment_names_the_stages_that_are_analyzed():
    experiment = resolve("demo", REPOSITORY / "experiments", REPOSITORY / "datasets")
    assert [*experiment.analyzed] == [*experiment.runs]
    first = experiment.analyzed["unifork-s1-classes"]
    assert (first.kinds, first.start) == (("alignment",), "models/unifork-init")
    assert resolve("compare", REPOSITORY / "experiments", REPOSITORY / "datasets").analyzed == {}


def test_prompts_are_those_of_a_benchmark_or_there_is_no_alignment(tiny_root, tmp_path, monkeypatch, capsys):
    """The stage and the command take the same texts; where its files are not here the stage says so and goes on."""
    root = copy_of(tiny_root, tmp_path / "root")
    copy_of(root / "models/unifork-init", root / "models/unifork-s3")
    analyses = {"alignment": ["s3"], "prompts": "geneval", "pairs": 20, "k": 3}
    changes = {"benchmarks": {"geneval": {}}, "analyses": analyses}
    (root / "params.yaml").unlink()
    monkeypatch.chdir(root)
    analyzed = write_experiment(root, changes).analyzed["unifork-s3"]
    assert (analyzed.kinds, analyzed.prompts) == (("alignment", "conflict", "entropy"), "data/evals/geneval")
    with pytest.raises(ConfigError, match=r"analyses\.prompts: unknown benchmark 'genevall'.*'geneval'"):
        write_experiment(root, {"benchmarks": {"geneval": {}}, "analyses": {"prompts": "genevall"}})
    write_experiment(root, changes | {"analyses": analyses | {"conflict": [], "entropy": []}})
    run_program("items", "geneval")
    run_program("analyze", "unifork-s3")
    assert "unifork-s3: no alignment: geneval is not here: put evaluation_metadata.jsonl" in capsys.readouterr().out
    assert list((root / "scores/analyses/unifork-s3").iterdir()) == []
    code, printed = run(capsys, "analyze", "alignment", "models/unifork-s3", "--benchmark", "geneval", "--out", "found")
    assert (code, printed.err.count("\n")) == (2, 1)
    assert "data/evals/geneval: not here: put evaluation_metadata.jsonl" in printed.err

    texts = [*PROMPTS, *PROMPTS[:2]]
    items = [Item(str(number), text, None, text) for number, text in enumerate(texts)]
    write_items(load_eval("geneval"), items, lambda name: b"", root / "data/evals/geneval", {})
    run_program("analyze", "unifork-s3")
    found = json.loads((root / "scores/analyses/unifork-s3/alignment.json").read_text())
    assert (found["prompts"], found["prompts_are"], found["choices"]["prompts"]) == (20, "geneval", "geneval")
    words = ("--benchmark", "geneval", "--pairs", 20, "--choose", "k=3", "--untrained", "models/unifork-init")
    code, printed = run(capsys, "analyze", "alignment", "models/unifork-s3", *words, "--out", "found")
    assert code == 0, printed.err
    again = json.loads(Path("found/alignment.json").read_text())
    assert again["curves"] == found["curves"]
    assert again["untrained"] == found["untrained"] != {}


def run_program(name: str, key: str) -> None:
    """A program of a stage, in this process and folder."""
    importlib.import_module(f"pipelines.{name}").main(key)
