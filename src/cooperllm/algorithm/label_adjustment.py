"""A loss that does not reward a device's model for knowing which labels are common there.

    π_i(c) = (N_ic + 1) / (N_i + C)                                         (1)  label shares of device i, smoothed
    ℓ_i    = -log softmax( s(x) + τ log π_i )_y                             (2)  τ = 1: the balanced softmax; τ = 0: cross entropy

Labels of devices are skewed, each in its own way. With plain cross entropy most of what a device's gradient says is "my labels are common",
and a cohort of a few devices pulls the class scores wherever its own mixture lies. With (2) that part is already explained by π_i, so that
gradients of unlike devices agree. π_i stays on the device; test scores are taken without it.

Dimension key: C classes, N_i examples of device i, N_ic of them of class c.

References:
    Ren et al., 2020, Balanced meta-softmax, arXiv:2007.10740, Eq. (3).
    Menon et al., 2021, Long-tail learning via logit adjustment, arXiv:2007.07314, Eq. (10).
    Zhang et al., 2022, Federated learning with label distribution skew via logits calibration, arXiv:2209.00189.
"""

import numpy as np
from jaxtyping import Float32, Int64


def label_adjustment(labels: Int64[np.ndarray, "_N"], num_classes: int, strength: float) -> Float32[np.ndarray, "C"]:
    """Gives what a device adds to its class scores before the loss, τ log π_i of eq. (1)-(2).

    Args:
        labels: Every label of the device, shape [N_i], in [0, C).
        num_classes: C.
        strength: τ >= 0.

    Returns:
        One number per class, <= 0, shape [C].

    Example:
        >>> label_adjustment(np.array([0, 0]), 2, 1.0).round(3)
        array([-0.288, -1.386], dtype=float32)
    """
    counts = np.bincount(labels, minlength=num_classes)
    return (strength * np.log((counts + 1) / (len(labels) + num_classes))).astype(np.float32)
