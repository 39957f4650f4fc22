"""MetaSemi (Zhang et al., AISTATS 2021): semi-supervised learning with meta-gradient.  The mathematics, and nothing else."""
from metasemi.check import check_model
from metasemi.gradient import METHODS, meta_gradient
from metasemi.losses import kl_divergence, squared_error
from metasemi.pseudo_labels import cross_domain_mixup, update_pseudo_labels
from metasemi.schedule import learning_rate, ramp
from metasemi.step import training_step

__version__ = "2.0.0"
__all__ = ["METHODS", "check_model", "cross_domain_mixup", "kl_divergence", "learning_rate", "meta_gradient", "ramp",
           "squared_error", "training_step", "update_pseudo_labels"]
