"""Search in a gallery: the encoded images of a model in a folder, and the images that score best with a caption.

`itm_fast.Gallery` is all that a user needs. `files` has the folder, `scoring` the exact scores, `pooled` the first
stage of a two-stage search, `measured` its recall, `found` what a search returns.
"""

from .found import Found, Recall
from .gallery import Gallery

__all__ = ["Found", "Gallery", "Recall"]
