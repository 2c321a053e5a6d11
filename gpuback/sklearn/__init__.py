"""scikit-learn's two multilayer perceptrons, computed by gpuback, and networks from fitted estimators.

Needs scikit-learn: pip install '.[sklearn]' in the source tree. Nothing in gpuback imports this package.
"""

from gpuback.errors import missing_extra

try:
    from gpuback.sklearn.conversion import from_sklearn as from_sklearn
    from gpuback.sklearn.estimators import MLPClassifier as MLPClassifier
    from gpuback.sklearn.estimators import MLPRegressor as MLPRegressor
except ImportError as error:
    if (error.name or "").partition(".")[0] != "sklearn":
        raise
    raise missing_extra("scikit-learn 1.7 or later", "gpuback.sklearn", "sklearn") from error
