"""Where the faces are in a picture, by the detector that comes with OpenCV (the extra `face`)."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sdlab.curate.crop.focus import Map, normalised, reduced, see_saliency
from sdlab.errors import SdlabError

_FACES_PX = 640  # faces of a twentieth of the shorter side have the 20 pixels that the detector needs
_FACE_MAP_PX = 200
_HEAD = 0.3  # of the face's box on each side: hair, ears and chin


class _Detector(Protocol):
    """cv2.CascadeClassifier, as far as it is used here."""

    def detectMultiScale(
        self, image: NDArray[np.uint8], scaleFactor: float, minNeighbors: int, *, minSize: tuple[int, int]
    ) -> Sequence[Sequence[int]]:
        """x, y, width and height of each face."""


class Faces:
    """Finds faces with the detector that comes with OpenCV; saliency where there are none.

    Viola, Jones 2001, "Rapid object detection using a boosted cascade of simple features". Made for one process:
    each thread loads its own detector, as one must not be used by two.
    """

    def __init__(self) -> None:
        try:
            import cv2
        except ImportError as reason:
            raise _lacking("needs OpenCV, which is not installed") from reason
        if not hasattr(cv2, "CascadeClassifier"):
            raise _lacking(f"OpenCV {cv2.__version__} comes without the detector")
        cv2.setNumThreads(1)  # the threads are ours: one for each picture
        self._own = threading.local()
        self.find(Image.new("RGB", (64, 64)))  # a broken installation is told before the first picture

    def __call__(self, image: Image.Image) -> tuple[Map | None, str]:
        boxes = self.find(image)
        if not boxes:
            return see_saliency(image)
        edges_N = (np.arange(_FACE_MAP_PX) + 0.5) / _FACE_MAP_PX
        map_HW = np.zeros((_FACE_MAP_PX, _FACE_MAP_PX), np.float32)
        for left, top, right, bottom in boxes:
            room_x, room_y = _HEAD * (right - left), _HEAD * (bottom - top)
            rows = (edges_N > top - room_y) & (edges_N < bottom + room_y)
            map_HW[np.ix_(rows, (edges_N > left - room_x) & (edges_N < right + room_x))] = 1
        return normalised(map_HW), "face"

    def find(self, image: Image.Image) -> list[tuple[float, float, float, float]]:
        """Left, top, right and bottom of every face, as fractions of the width and height."""
        grey = np.asarray(reduced(image.convert("L"), _FACES_PX))
        height, width = grey.shape
        least = max(20, round(0.05 * min(grey.shape)))
        found = self._detector().detectMultiScale(grey, 1.1, 5, minSize=(least, least))
        return sorted((x / width, y / height, (x + w) / width, (y + h) / height) for x, y, w, h in found)

    def _detector(self) -> _Detector:
        if not hasattr(self._own, "detector"):
            import cv2

            folder = os.path.join(os.path.dirname(cv2.__file__), "data")
            path = os.path.join(folder, "haarcascade_frontalface_alt2.xml")
            self._own.detector = cv2.CascadeClassifier(path)
        detector: _Detector = self._own.detector
        return detector


def _lacking(what: str) -> SdlabError:
    return SdlabError(what, where="--focus face", next_step='Type: pip install "sdlab[face]"')
