"""Models that vLLM is known to run unlike transformers: whole, before any layer is skipped.

Measured with vLLM 0.32's CPU build and transformers 5.19 in float32, on small random models of each
type: the share by which the whole model's loss differs. The types in the table of
docs/engines/vllm.md stay below 1e-5. Other devices have kernels of their own, and may agree or not;
what is certain everywhere is that scores of the two engines are compared before they are mixed
(`ScoringSession.check_same_scores`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MEASURED = {
    "apertus": 9.7e-5,
    "cohere2": 1.8e-3,
    "deepseek_v3": 1.0e-2,
    "ernie4_5_moe": 2.1e-2,
    "lfm2_moe": 1.6e-2,
    "mamba2": 1.5e-2,
    "nemotron_h": 1.1e-2,
    "zamba2": 5.7e-4,
}
"""`model_type` -> the share.

Mamba-2 is unlike with more than one group alone: vLLM's gated norm takes each group by itself,
transformers' all of them together. DeepSeek-V3 is unlike where its config.json has no
`scoring_func`, as transformers 5 saves it: vLLM then weighs experts by a softmax, transformers
always by a sigmoid. With `"scoring_func": "sigmoid"` both agree to 1.3e-7. Of the others the cause
is not known.
"""


def known_difference(config: Mapping[str, Any]) -> float | None:
    """The share by which vLLM's loss of such a model was seen to differ; None: it was not."""
    kind = str(config.get("model_type"))
    if kind == "mamba2" and config.get("n_groups") == 1:
        return None
    if kind == "deepseek_v3" and config.get("scoring_func") == "sigmoid":
        return None
    return MEASURED.get(kind)
