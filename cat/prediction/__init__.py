"""What a fine-tuned checkpoint says about audio: scores of its classes, and sound events."""

from cat.prediction.classifier import CATClassifier, Prediction, Scores
from cat.prediction.events import Event, EventFinder, EventSettings, find_events
from cat.prediction.windows import Plan, Window, Windower

__all__ = [
    "CATClassifier",
    "Event",
    "EventFinder",
    "EventSettings",
    "Plan",
    "Prediction",
    "Scores",
    "Window",
    "Windower",
    "find_events",
]
