"""The values that a setting has to choose from."""

from enum import Enum


class ClipModelOptions(str, Enum):
    """The three published models, by their OpenCLIP architecture names."""

    ViT_B_32 = "ViT-B-32"
    ViT_B_16 = "ViT-B-16"
    ViT_SigLIP_2_16 = "ViT-B-16-SigLIP2-256"


class LossFunctionOptions(str, Enum):
    CONTRASTIVE = "contrastive"  # InfoNCE
    SIGLIP = "siglip"  # sigmoid


class CaptionChoice(str, Enum):
    ORIGINAL = "original"  # the first caption, always
    UNIFORM = "uniform"  # any of the sample's captions, drawn anew each time
    WEIGHTED = "weighted"  # the first with a set probability, else any of the others


class Precision(str, Enum):
    AUTO = "auto"  # on a GPU bf16 where it has hardware for it, else fp16; on a CPU fp32
    FP32 = "fp32"  # no mixed precision
    FP16 = "fp16"  # with a scaler of the loss
    BF16 = "bf16"  # the range of fp32, fewer digits


class LearningRateSchedule(str, Enum):
    COSINE = "cosine"  # falls to 0 at the end of the budget, as half a cosine
    CONSTANT = "constant"  # stays as it is


class BatchNorms(str, Enum):
    """What training does with the running statistics of batch norms."""

    FIXED = "fixed"  # they are used, and stay as they are
    UPDATE = "update"  # each batch is normalised by its own, which move the running ones
    LEGACY = (
        "legacy"  # as before there was a choice: frozen ones and micro-batches move them too, the average does not know them
    )


class RetrievalProtocol(str, Enum):
    """What counts as right in an evaluation, and among what: see ``protocols`` and docs/evaluation.md."""

    INSTANCE = "instance"  # photo i's first caption, for photo i only
    PRODUCT = "product"  # one text a product, any photo of the product
    CANDIDATES_101 = "candidates_101"  # against 100 others of the same category
    ALL_CAPTIONS = "all_captions"  # every caption of a photo is a query


class PositivePairs(str, Enum):
    """Which pairs of a batch belong together: photos of one product, and captions of the same words, do."""

    PAIR = "pair"  # a photo and its own caption only; all else is a negative, as OpenCLIP's losses have it
    ALL = "all"  # every photo and caption that belong together attract each other
    MASK = "mask"  # those that belong together but are not a pair neither attract nor repel each other
