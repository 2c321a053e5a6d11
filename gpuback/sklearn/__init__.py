"""A door to scikit-learn: its two multilayer perceptrons, computed by gpuback, and networks from fitted ones.

Needs scikit-learn: pip install 'gpuback[sklearn]'. Nothing in gpuback imports this package.
"""

from importlib.util import find_spec

from gpuback.errors import missing_extra

if find_spec("sklearn") is None:
    raise missing_extra("scikit-learn", "gpuback.sklearn", "sklearn")

from gpuback.sklearn.conversion import from_sklearn as from_sklearn
from gpuback.sklearn.estimators import MLPClassifier as MLPClassifier
from gpuback.sklearn.estimators import MLPRegressor as MLPRegressor
