"""Masked regression loss on the un-repeated targets of the clips."""

from .op import masked_regression_loss
from .reference import RegressionLoss, masked_regression_loss_reference

__all__ = ["RegressionLoss", "masked_regression_loss", "masked_regression_loss_reference"]
