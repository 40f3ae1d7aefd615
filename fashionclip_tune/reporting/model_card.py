"""The card of a sweep's winner: a README.md with the hub's metadata."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

import fashionclip_tune
from fashionclip_tune.evaluation.evaluate import counted_as
from fashionclip_tune.evaluation.metric import metric_of
from fashionclip_tune.reporting.sweep_files import TrialRow, ranked, start_of

_USE = """```python
from pathlib import Path
import open_clip, torch
from PIL import Image

name, files = "local-dir:PATH/OF/THIS/FOLDER", sorted(Path("photos").glob("*.jpg"))  # or hf-hub:ORG/NAME
model, _, preprocess = open_clip.create_model_and_transforms(name)
tokens = open_clip.get_tokenizer(name)(["a red summer dress"])
with torch.no_grad():
    photos = model.eval().encode_image(torch.stack([preprocess(Image.open(file)) for file in files]), normalize=True)
    scores = photos @ model.encode_text(tokens, normalize=True)[0]
for rank, place in enumerate(scores.argsort(descending=True)[:10].tolist(), 1):
    print(f"{rank}. {files[place]} ({scores[place]:.3f})")
```"""


def model_card(sweep: Mapping[str, Any], best: TrialRow, known: Mapping[str, Any]) -> str:
    """The card as text.

    Args:
        sweep: the content of sweep.json, or what is there while the sweep runs.
        best: the trial whose weights it describes.
        known: of the weights that it started from: ``license``, ``base_model`` and the like.
    """
    metric, name = metric_of(sweep), str(sweep["name"])
    score, interval, zero_shot = metric.score(best), metric.interval(best), metric.zero_shot(best)
    data = sweep.get("data") or {}
    sizes = {part: data.get(part) or {} for part in ("train", "valid")}
    photos = {part: f"{each.get('photos', 0):,} photos of {each.get('products', 0):,} products" for part, each in sizes.items()}
    result = EvalResult(
        task_type="zero-shot-image-classification",  # the hub has no task for retrieval; the metric says what it is
        task_name="image-text retrieval",
        dataset_type="private",
        dataset_name=f"validation photos of sweep {name}",
        metric_type=metric.name,
        metric_name=metric.label,
        metric_value=round(score, 4),
    )
    head = ModelCardData(
        library_name="open_clip",
        pipeline_tag="zero-shot-image-classification",
        tags=["clip", "fashion", "image-text-retrieval"],
        model_name=name,
        eval_results=[result],
        **known,
    )
    base = known.get("base_model")
    said = ", ".join([base] if isinstance(base, str) else base or []) or start_of(best)
    settings = "\n".join(f"| `{path}` | {_cell(value)} |" for path, value in best["config"].items())
    among = f" Counted as {counted_as(best)}." if best.get("protocol") else ""
    of_interval = "" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"
    zero_shot_row = "" if zero_shot is None else f"| the weights it started from | {zero_shot:.4f} | |\n"
    num_trials = len(ranked(sweep["trials"], metric))
    return f"""---
{head.to_yaml()}
---

# {name}

Finds photos by words, and words by photos. Fine-tuned from {said} on {photos["train"]}: trial {best["trial_id"]}, the best of
{num_trials}, of a sweep by fashionclip-tune {fashionclip_tune.__version__}.

## Figures

| | {metric.label} | 95 % interval |
|---|---|---|
| this model | {score:.4f} | {of_interval} |
{zero_shot_row}
On {photos["valid"]} that no trial was trained on.{among} The interval is over products.

## Limits

- It was chosen as the best of {num_trials} trials on these very photos, so the figure is too high: expect less on others.
- It knows photos and captions like those it was trained on. Queries of another style, language or product were not measured.
- What the card of {said} says of its data, bias and intended use holds here, too. So does its licence.

## Settings

| setting | value |
|---|---|
{settings}

## Use

{_USE}
"""


def _cell(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
