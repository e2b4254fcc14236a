"""What a fine-tuned checkpoint says about audio: scores of its classes, and sound events."""

from cat.prediction.classifier import CATClassifier, ClipScores, Prediction
from cat.prediction.events import Event, EventFinder, EventSettings, find_events
from cat.prediction.windows import Plan, Window, Windower

__all__ = [
    "CATClassifier",
    "ClipScores",
    "Event",
    "EventFinder",
    "EventSettings",
    "Plan",
    "Prediction",
    "Window",
    "Windower",
    "find_events",
]
