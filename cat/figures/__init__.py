"""Pictures of runs, spectrograms, embeddings and scores."""

from cat.figures.canvas import is_figure
from cat.figures.embeddings import write_projection
from cat.figures.layers import write_layers
from cat.figures.prediction import write_prediction
from cat.figures.runs import smoothed, write_agreement, write_finetune_figure, write_loss_curves, write_run_figures
from cat.figures.spectrograms import write_patches
from cat.figures.studies import write_study_curves, write_study_ends

__all__ = [
    "is_figure",
    "smoothed",
    "write_agreement",
    "write_finetune_figure",
    "write_layers",
    "write_loss_curves",
    "write_patches",
    "write_prediction",
    "write_projection",
    "write_run_figures",
    "write_study_curves",
    "write_study_ends",
]
