"""Pictures of runs, spectrograms, embeddings, scores and of what the stem computes."""

from cat.figures.canvas import is_figure
from cat.figures.embeddings import write_projection
from cat.figures.layers import write_layers
from cat.figures.positions import write_halo, write_reach
from cat.figures.prediction import write_prediction
from cat.figures.runs import smoothed, write_agreement, write_finetune_figure, write_loss_curves, write_run_figures
from cat.figures.spectrograms import visible_grid, write_patches
from cat.figures.studies import write_study_curves, write_study_ends

__all__ = [
    "is_figure",
    "smoothed",
    "visible_grid",
    "write_agreement",
    "write_finetune_figure",
    "write_halo",
    "write_layers",
    "write_loss_curves",
    "write_patches",
    "write_prediction",
    "write_projection",
    "write_reach",
    "write_run_figures",
    "write_study_curves",
    "write_study_ends",
]
