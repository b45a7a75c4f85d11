"""Studies: statistics against scipy, verdicts, missing runs, what is refused, and the same bytes again."""

import json
import re
import subprocess
import sys
from math import inf, sqrt

import pytest
import yaml
from PIL import Image
from report_samples import FakeCodec, alignment
from scipy import stats
from study_samples import OVERALL, VARIANTS, record, write_study
from test_page import Page
from test_seeds_page import compared, rewrite  # noqa: F401  a fixture
from typer.testing import CliRunner

from unifork.cli import app
from unifork.config import AnalyzedRun, load_eval
from unifork.errors import ConfigError, DataError
from unifork.evaluation.items import Item, write_items
from unifork.evaluation.statistics import t_reach
from unifork.experiments import params_text
from unifork.report.build import build
from unifork.report.study import family, judged, quantities, read_results, read_study
from unifork.report.study_page import differences, tables
from unifork.shards.manifest import write_json

ABOVE = {"shared": [0.50, 0.52, 0.48, 0.51], "fork-3": [0.60, 0.63, 0.57, 0.62], "fork-1": [0.5, 0.6, 0.4, 0.5]}


def hypotheses(folder, *entries):
    plain = {"says": "it is so", "first": "fork-3", "second": "shared", "score": OVERALL, "sign": ">"}
    listed = [entry if "analysis" in entry else {"id": f"H{n}", **plain, **entry} for n, entry in enumerate(entries)]
    (folder / "hypotheses.yaml").write_text(yaml.safe_dump(listed))
    return folder


def run(*arguments):
    return CliRunner().invoke(app, ["study", *map(str, arguments)])


@pytest.mark.parametrize(("freedom", "outside"), [(1, 0.05), (1, 0.05 / 45), (4, 0.05), (4, 0.05 / 9), (9, 1e-4)])
def test_reach_is_that_of_scipy(freedom, outside):
    assert t_reach(freedom, outside) == pytest.approx(stats.t.ppf(1 - outside / 2, freedom), rel=1e-6)


def test_differences_are_those_of_scipy(tmp_path):
    results = read_results(write_study(tmp_path, ABOVE, range(4)))
    pairs = [("fork-3", "shared", (OVERALL,)), ("fork-1", "shared", (OVERALL,))]
    found = family(results, pairs)
    for row in found:
        differences = [a - b for a, b in zip(ABOVE[row.first], ABOVE["shared"], strict=True)]
        expected = stats.ttest_rel(ABOVE[row.first], ABOVE["shared"])
        assert row.found.p == pytest.approx(expected.pvalue, rel=1e-6)
        assert row.found.difference.mean == pytest.approx(sum(differences) / 4)
        for level, ends in ((0.95, row.found.difference.interval), (0.975, row.wide)):
            interval = expected.confidence_interval(level)
            assert ends == pytest.approx((interval.low, interval.high), rel=1e-6)
    ps = sorted(row.found.p for row in found)
    assert sorted(row.corrected for row in found) == pytest.approx([2 * ps[0], max(2 * ps[0], ps[1])])


def test_means_have_deviation_and_interval(tmp_path):
    shown = {table.label: table for table in tables(read_results(write_study(tmp_path, ABOVE, range(4))))}
    table = shown["shapes-generation seen"]
    cell = dict(zip(table.columns, table.rows[0], strict=True))["overall"]
    reach = stats.t.ppf(0.975, 3) * stats.tstd(ABOVE["shared"]) / sqrt(4)
    mean = sum(ABOVE["shared"]) / 4
    assert cell == f"{mean:.3g} ± {stats.tstd(ABOVE['shared']):.2g} ({mean - reach:.3g} to {mean + reach:.3g})"


@pytest.mark.parametrize(
    ("first", "sign", "expected"),
    [
        ("fork-3", ">", "holds"),
        ("fork-3", "<", "contradicted"),
        ("fork-3", "!=", "holds"),
        ("fork-1", ">", "not settled"),
        ("fork-1", "!=", "not settled"),
    ],
)
def test_verdicts(tmp_path, first, sign, expected):
    folder = hypotheses(write_study(tmp_path, ABOVE, range(4)), {"first": first, "sign": sign})
    ((_, row, verdict),) = judged(read_results(folder))
    assert (verdict, row.runs) == (expected, 4)


def test_equal_differences_settle_nothing(tmp_path):
    values = {"shared": [0.4, 0.5], "fork-3": [0.5, 0.6]}
    ((_, row, verdict),) = judged(read_results(hypotheses(write_study(tmp_path, values), {})))
    assert (row.runs, verdict) == (2, "not settled")
    assert row.wide == pytest.approx((0.1, 0.1))


def test_a_family_shares_the_risk(tmp_path):
    folder = write_study(tmp_path, {"shared": [0.50, 0.52, 0.48], "fork-3": [0.60, 0.66, 0.57], "fork-1": []})
    alone = judged(read_results(hypotheses(folder, {})))[0]
    assert alone[2] == "holds"
    many = [{}, {"family": "other"}, *[{"first": "fork-1"}] * 4]
    shared, other, *empty = judged(read_results(hypotheses(folder, *many)))
    assert shared[2] == "not settled"
    assert shared[1].corrected == pytest.approx(5 * alone[1].found.p)
    assert other[1:] == alone[1:]
    assert {verdict for *_, verdict in empty} == {"not measured"}


def test_pairs_that_exist_are_used(tmp_path):
    values = {"shared": [0.50, 0.52, 0.48, 0.51], "fork-3": [0.60, 0.63], "fork-1": [0.7]}
    folder = hypotheses(write_study(tmp_path, values, range(4)), {}, {"first": "fork-1", "family": "other"})
    (_, two, _), (_, single, verdict) = judged(read_results(folder))
    assert (two.runs, single.runs, single.found, single.wide) == (2, 1, None, (-inf, inf))
    assert verdict == "not measured"
    result = run("show", folder, "--out", tmp_path / "out")
    assert "H1: not measured (1 seeds)" in result.output
    assert (
        "| shapes-generation seen overall | fork-1 | 1 | - | - | - | - | - |"
        in (tmp_path / "out/tables.md").read_text()
    )


def test_every_number_has_a_name():
    found = quantities(record("fork-3", 1))
    assert found["loss s2 world image depth 0"] == record("fork-3", 1).losses["s2 world image depth 0"]
    scores = record("fork-3", 1).alignment["s2"]["generation"].score
    places = {"0": scores[0], "4": scores[4], "last": scores[4], "highest": scores[4], "fall": 0.0}
    assert {place: found[f"alignment s2 generation {place}"] for place in places} == places
    layers = record("fork-3", 1).conflict["s2"]["down_proj"]
    assert found["conflict s2 down_proj mean"] == pytest.approx(sum(layers.values()) / 3)
    assert (found["seconds s2"], found["parameters"]) == (101.0, 1000.0)


def test_the_mean_of_several_quantities_is_taken_for_each_seed(tmp_path):
    names = ["alignment s2 generation last", "loss s2 world text"]
    results = read_results(hypotheses(write_study(tmp_path), {"score": names}))
    ((_, row, _),) = judged(results)
    found = [quantities(record("fork-3", seed)) for seed in range(3)]
    assert row.found.first.mean == pytest.approx(sum(sum(run[name] for name in names) / 2 for run in found) / 3)


def test_references_come_from_the_command_the_file_or_the_hypotheses(tmp_path):
    folder = write_study(tmp_path)
    assert read_results(folder).references == ["shared"]
    assert read_results(hypotheses(folder, {"second": "fork-1"})).references == ["fork-1"]
    listed = {"analysis": {"references": ["fork-3", "shared"]}}
    results = read_results(hypotheses(folder, {}, listed))
    assert results.references == ["fork-3", "shared"]
    assert [row[1] for row in differences(results, "fork-3").rows[:2]] == ["shared", "fork-1"]
    assert read_results(folder, ("fork-1",)).references == ("fork-1",)
    assert "references: unknown variant 'mot'" in str(run("show", folder, "--out", "x", "--reference", "mot").exception)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"first": "fork-4"}, "H0: unknown variant 'fork-4'. .* Known: fork-1, fork-3, shared"),
        ({"score": "shapes-generation seen overal"}, f"H0: unknown quantity .*Did you mean '{OVERALL}'"),
        ({"sign": ">="}, "sign: Input should be '>', '<' or '!='"),
        ({"why": "so"}, "unknown key 'why'"),
        ({"analysis": {"references": ["mot"]}}, "references: unknown variant 'mot'"),
        ({"analysis": {"reference": ["mot"]}}, "unknown key 'reference'"),
    ],
)
def test_what_hypotheses_may_not_say(tmp_path, entry, message):
    with pytest.raises(ConfigError, match=message):
        read_results(hypotheses(write_study(tmp_path), entry))


def test_tables_and_figures_need_no_torch(tmp_path):
    arguments = ["study", "show", str(write_study(tmp_path)), "--out", str(tmp_path / "out")]
    call = f"app({arguments}, standalone_mode=False)"
    code = f"import sys; from unifork.cli import app; {call}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_before_the_first_run_hypotheses_are_not_measured(tmp_path):
    folder = hypotheses(write_study(tmp_path, {}), {"score": "a score of later"})
    assert [verdict for *_, verdict in judged(read_results(folder))] == ["not measured"]
    assert run("show", folder, "--out", tmp_path / "out").exit_code == 0


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("study.json", "{", r"study.json: damaged"),
        ("fork-3-seed1.json", '{"variant": "fork-3"}', r"fork-3-seed1.json: seed: Field required"),
        ("fork-3-seed1.json", "[]", r"fork-3-seed1.json: damaged: Input should be an object"),
        ("fork-3-seed7.json", "COPY", r"fork-3-seed7.json: is of fork-3-seed1.json"),
        ("hypotheses.yaml", "H1: x", r"hypotheses.yaml: dict; a list"),
        ("hypotheses.yaml", "- [", r"hypotheses.yaml, line 1"),
    ],
)
def test_wrong_files_are_named_in_one_line(tmp_path, file, text, message):
    folder = write_study(tmp_path)
    (folder / file).write_text((folder / "fork-3-seed1.json").read_text() if text == "COPY" else text)
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        read_results(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("key", "value"), [("items", {"shapes-generation": "bb"}), ("config_hash", "another")])
def test_runs_of_other_items_or_configurations_are_refused(tmp_path, key, value):
    path = write_study(tmp_path) / "fork-3-seed1.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(DataError, match=r"fork-3-seed\d.json: .*, in other runs"):
        read_results(tmp_path)


def test_shown_again_every_byte_is_the_same(tmp_path):
    folder = hypotheses(write_study(tmp_path / "study"), {}, {"sign": "!=", "family": "other"})
    Image.new("RGB", (8, 8), "red").save(folder / "grid.png")
    outs = [tmp_path / name for name in ("a", "b")]
    for out in outs:
        assert run("show", folder, "--out", out).exit_code == 0
    contents = [{path.name: path.read_bytes() for path in out.iterdir()} for out in outs]
    assert contents[0] == contents[1]
    svgs = {f"{name}.svg" for name in ("alignment-by-layer", "conflict-by-layer", "loss-s2")}
    svgs |= {"shapes-generation-seen.svg", "shapes-generation-held-out.svg"}
    assert contents[0].keys() == svgs | {"tables.md", "scores.csv", "index.html"}
    page = Page(contents[0]["index.html"].decode())
    assert all(source.startswith("data:") for source in page.resources)
    assert len([image for image in page.images if image["src"].startswith("data:image/png")]) == 1
    assert "fork-3,2,shapes-generation seen overall," in contents[0]["scores.csv"].decode()
    for variant in VARIANTS:
        assert variant in contents[0]["alignment-by-layer.svg"].decode()


def with_items(where):
    """Items of the images that `write_scores` draws."""
    asked_for = {"0": ("a cross", "single_object", "seen"), "1": ("red", "colors", "held_out")}
    items = [Item(n, text, {}, n, split, "", 0.1, {"kind": kind}) for n, (text, kind, split) in asked_for.items()]
    write_items(load_eval("shapes-generation", where.evals), items, lambda _: b"", where.items("shapes-generation"), {})


def test_finished_runs_are_recorded_and_shown(compared):  # noqa: F811
    _, where = compared
    with_items(where)
    gone = where.scores("fork-seed2") / "shapes-generation" / "metrics.json"
    kept = gone.read_bytes()
    gone.unlink()
    result = run("record", "study")
    assert result.exit_code == 0, result.output
    assert "dense-seed0: recorded\n" in result.output
    assert "fork-seed2: missing: scores/fork-seed2/shapes-generation/metrics.json\n" in result.output
    study, results = read_study(where.root / "study"), read_results(where.root / "study")
    assert [variant.name for variant in study.variants] == ["dense", "fork"]
    assert study.variants[0].fork == 1
    assert [prompt.text for prompt in study.prompts] == ["a cross", "red"]
    (first, *_) = results.records
    assert first.scores[OVERALL].model_dump() == {"value": 0.5, "error": 0.0625, "chance": 0.125}
    assert first.losses["s1 world-caption-generate image"] == 2.7
    assert first.parameters == 20 + 10 + 6 + 6 + 2 + 16 + 32
    assert first.seconds == {"s1": 90.0, "s3": 90.0}
    assert first.versions["TRAIN_VERSION"] >= 2
    assert "REPORT_VERSION" not in first.versions
    gone.write_bytes(kept)
    rewrite(where, "dense-seed0", 0.9)
    assert "dense-seed0: recorded before\n" in (output := run("record", "study").output)
    assert "fork-seed2: recorded\n" in output
    assert read_results(where.root / "study").values["dense"][0][OVERALL] == 0.5
    run("record", "study", "--again")
    assert read_results(where.root / "study").values["dense"][0][OVERALL] == 0.9
    assert run("show", "study", "--out", "shown").exit_code == 0
    assert run("grid", "study", "--out", "study/grid.png").output == "study/grid.png: 2 of 2 variants\n"
    with Image.open("study/grid.png") as image:
        assert (255, 0, 0) in {color for _, color in image.convert("RGB").getcolors(1 << 20)}
    with pytest.raises(DataError, match="with seed 9"):
        raise run("grid", "study", "--out", "x.png", "--seed", "9").exception


def test_variants_and_seeds_may_be_recorded_apart(compared):  # noqa: F811
    plan, where = compared
    run("record", "study")
    whole = read_results(where.root / "study")
    alone = plan.model_copy(
        update={"variants": {name: v for name, v in plan.variants.items() if name == "fork-seed1"}, "seeds": (1,)}
    )
    alone = alone.model_copy(update={"runs": {key: r for key, r in plan.runs.items() if r.variant == "fork-seed1"}})
    where.params.write_text(params_text(alone))
    assert run("record", "study", "--again").output == "fork-seed1: recorded\n"
    assert read_results(where.root / "study")[:2] == whole[:2]
    where.params.write_text(params_text(alone.model_copy(update={"data_seed": 5})))
    with pytest.raises(ConfigError, match=r"data_seed: 0, in params.yaml 5"):
        raise run("record", "study").exception


def write_analyses(where, run):
    columns = record("fork-3", 0).alignment["s2"]["generation"].model_dump()
    write_json(where.analysis(run) / "alignment.json", alignment({"generation": columns}))
    (where.analysis(run) / "alignment.svg").write_text("<svg/>")
    names = ("layers.0.mlp.shared.down_proj.weight", "layers.10.attention.shared.o_proj.weight")
    matrices = {name: {"conflict": 0.123456789, "baseline": 0.5, "similarity": 0.376543211} for name in names}
    found = {"documents": {"generation": 3, "understanding": 3}, "loss": "mean", "matrices": matrices}
    write_json(where.analysis(run) / "conflict.json", found)


def test_what_was_looked_at_inside_models_is_recorded_and_on_the_page(compared):  # noqa: F811
    plan, where = compared
    runs = [f"{name}-s3" for name in plan.variants]
    plan = plan.model_copy(
        update={"analyzed": {run: AnalyzedRun(kinds=("alignment", "conflict"), start="m", prompts="p") for run in runs}}
    )
    where.params.write_text(params_text(plan))
    for run_name in runs[:-1]:
        write_analyses(where, run_name)
    output = run("record", "study").output
    assert f"fork-seed2: missing: scores/analyses/{runs[-1]}/alignment.json and 1 more\n" in output
    results = read_results(where.root / "study")
    (first, *_) = results.records
    assert first.alignment["s3"]["generation"] == record("fork-3", 0).alignment["s2"]["generation"]
    assert first.conflict == {"s3": {"down_proj": {0: 0.123457}, "o_proj": {10: 0.123457}}}
    page = Page(build(plan, where, FakeCodec))
    text = re.sub(r"\s+", " ", page.text)
    assert "Variant seen: Images from text, mean of the six kinds " in text
    assert " dense 0.5 ± 0.1 (0.252 to 0.748) " in text
    assert " fork 0.61 ± 0.057 " in text  # of the two that are finished
    assert sum(image["alt"].startswith("alignment by layer: dense s3 generation 0 3 ") for image in page.images) == 1
    assert sum("Alignment by layer after" in image["alt"] for image in page.images) == 2  # of the first seeds


def test_a_folder_that_is_no_study_is_named(tmp_path):
    for arguments in (("show", tmp_path, "--out", "x"), ("grid", tmp_path, "--out", "x.png")):
        assert "no such file; `unifork study record" in str(run(*arguments).exception)
