"""Region features from a folder of pictures: what `itm-fast features` runs.

`pictures` finds and opens pictures, `backbones` computes feature maps, `detectors` features of boxes, `arrays` reads
features that exist already, one file per image, `captions` reads files of captions, and `writing` makes a split of
SCAN's folder from them.
"""
