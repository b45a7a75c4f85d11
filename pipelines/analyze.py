"""Look inside the model of one run: alignment by layer, gradient conflict, entropy, as the experiment wants it."""

from pathlib import Path

from unifork.analysis.kinds import analyze
from unifork.analysis.runs import RunDocuments
from unifork.config import load_experiment
from unifork.errors import one_of
from unifork.evaluation.items import questions
from unifork.evaluation.names import ABSENT
from unifork.jobs import own_device, program
from unifork.layout import Layout
from unifork.library import Model
from unifork.shards.manifest import read_manifest

LAYOUT = Layout()


def main(name: str) -> None:
    # in: the model of a run, and the one that its variant began with
    params = load_experiment()
    one_of("analyzed run", name, params.analyzed, "params.yaml: analyzed")
    wanted = params.analyzed[name]
    device = own_device("analyze")
    model, untrained = (Model.load(folder, device) for folder in (LAYOUT.model(name), Path(wanted.start)))
    documents = RunDocuments(name, model, params.analyses)
    kinds, prompts = wanted.kinds, None
    if benchmark := params.analyses.prompts:
        if absent := read_manifest(LAYOUT.items(benchmark)).lineage.get(ABSENT):
            print(f"{name}: no alignment: {benchmark} is not here: {absent}")
            kinds = tuple(kind for kind in kinds if kind != "alignment")
        else:
            prompts = questions(LAYOUT.items(benchmark))

    # out: numbers and a figure of each kind
    LAYOUT.analysis(name).mkdir(parents=True, exist_ok=True)
    for kind in kinds:
        analyze(kind, documents, LAYOUT.analysis(name), prompts, untrained)
        print(f"{name}: {kind} -> {LAYOUT.analysis(name) / kind}.json", flush=True)


if __name__ == "__main__":
    program(LAYOUT.analysis, main, "analyzed run, <variant>-<stage>")
