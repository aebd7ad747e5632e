"""cuconv: depthwise convolution on GPU arrays, at the speed of their memory."""

from .depthwise import depthwise_conv2d

__all__ = ["depthwise_conv2d"]
__version__ = "0.1.0"
