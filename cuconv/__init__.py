"""cuconv: depthwise convolution on GPU arrays, at the speed of their memory."""

from .batchnorm import fold_batchnorm
from .depthwise import depthwise_conv2d, depthwise_conv2d_dgrad, depthwise_conv2d_wgrad
from .pointwise import pointwise_conv2d, pointwise_conv2d_dgrad, pointwise_conv2d_wgrad
from .separable import separable_conv2d
from .separable_backward import separable_conv2d_backward

__all__ = [
    "depthwise_conv2d",
    "depthwise_conv2d_dgrad",
    "depthwise_conv2d_wgrad",
    "fold_batchnorm",
    "pointwise_conv2d",
    "pointwise_conv2d_dgrad",
    "pointwise_conv2d_wgrad",
    "separable_conv2d",
    "separable_conv2d_backward",
]
__version__ = "0.1.0"
