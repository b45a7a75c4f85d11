"""What a user writes, typed: data cards, experiments and clusters.

Three kinds of file, three owners: `datasets/*.yaml` says what the data is (`datasets/evals/*.yaml` the benchmarks),
`params.yaml` (written by `unifork use NAME` from `experiments/`) what the experiment is, `clusters/*.yaml` where it
runs.
No key lives in two of them. Everything is frozen, unknown keys are errors.
"""

from unifork.config.base import StrictModel, fingerprint, load, parse, read_yaml
from unifork.config.card import (
    Card,
    FilterRule,
    Source,
    TaskUse,
    load_card,
    located,
)
from unifork.config.cluster import (
    CLUSTER,
    IN_JOB,
    ROOT,
    Cluster,
    JobResources,
    Step,
    TrainResources,
    WebAccess,
    cluster_file,
    in_job,
    load_cluster,
)
from unifork.config.evals import AnswerPart, EvalCard, Network, TextCard, load_eval, load_text
from unifork.config.experiment import (
    ANALYSES,
    NOT_IN_THE_WEIGHTS,
    Analysis,
    AnalyzedRun,
    Benchmark,
    DatasetUse,
    Experiment,
    Followed,
    HeadConfig,
    LossBand,
    MixtureEntry,
    PreparedSet,
    Sampling,
    Stage,
    StageRun,
    Track,
    Variant,
    load_experiment,
)
from unifork.config.optimization import Averaging, Lora, OptimizerConfig
from unifork.config.tokenizers import (
    DecoderConfig,
    EncoderConfig,
    ImageTokenizerConfig,
    ImportedTokenizer,
    TextTokenizerConfig,
    TextTokenizerImport,
    TokenizerShape,
    TokenizerTraining,
)
