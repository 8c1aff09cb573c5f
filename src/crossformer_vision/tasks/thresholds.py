"""Score thresholds at which the F1 score is best."""

import numpy as np
from numpy.typing import NDArray


def best_threshold(
    scores: NDArray[np.floating], is_correct: NDArray[np.bool_], positives: int | None = None
) -> float:
    """Score at which the F1 score is best, the highest of equally good ones.

    Args:
        scores: Scores of predictions, ``(n,)``.
        is_correct: Whether each prediction is correct, ``(n,)``.
        positives: Number of true objects, of which some may have no prediction. ``None`` for the number of
            correct predictions.

    Returns:
        One of the scores; 0.5 if no prediction is correct.
    """
    if not is_correct.any():
        return 0.5
    order = np.argsort(-scores, kind="stable")
    scores, correct = scores[order], is_correct[order].cumsum()
    total = int(correct[-1]) if positives is None else positives
    f1 = 2 * correct / (np.arange(1, len(scores) + 1) + total)
    is_last = np.append(scores[1:] != scores[:-1], True)  # of equal scores
    return float(scores[is_last][f1[is_last].argmax()])
