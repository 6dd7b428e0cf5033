"""Data sets, networks and training; this room knows nothing of masks.

A *data set* has a training and a test set of labelled images, as *arrays* or as *files*. *Splits*
say which rows of the training set train (search-train), score candidates (search-val) and decide
among the finalists (choose-val). *Images* are some of these rows on one device, served in
normalised *batches*. A *recipe* holds the settings of a training; a *training state* is its state
between two epochs. *Metrics* are loss and accuracy on images, after the batch norm of a pruned
network was *recalibrated*. A *compute configuration* says how passes are computed.
"""

from __future__ import annotations

from fppmo_ray.training.batchnorm import fold_batchnorm, recalibrate_batchnorm
from fppmo_ray.training.checkpoints import (
    TrainingState,
    capture,
    load_weights,
    state_from_bytes,
    state_to_bytes,
)
from fppmo_ray.training.compute import (
    PLAIN_COMPUTE,
    ComputeConfig,
    DType,
    autocast,
    keep_freed_memory,
    lay_out,
    native_dtype,
)
from fppmo_ray.training.dataset import (
    Augmentation,
    CentreCrop,
    Dataset,
    ImageArrays,
    ImageFiles,
    ImageSet,
    PreparedInputs,
    RandomResizedCrop,
    Squash,
    View,
)
from fppmo_ray.training.ddp import WHOLE, Shard
from fppmo_ray.training.evaluate import Metrics, evaluate
from fppmo_ray.training.fine_tune import EpochReport, fine_tune, train_epoch
from fppmo_ray.training.image_folder import load_image_folder, load_imagenet
from fppmo_ray.training.images import Batch, Images, Seed, example_batch, open_images
from fppmo_ray.training.named_datasets import DatasetName, load_dataset
from fppmo_ray.training.networks import (
    NETWORKS,
    build_network,
    build_torchvision_network,
    source_of,
    torchvision_source,
)
from fppmo_ray.training.preprocessing import (
    Interface,
    Preprocessing,
    Transform,
    interface_from_json,
    interface_of,
    transform_of,
)
from fppmo_ray.training.recipe import Recipe, Schedule
from fppmo_ray.training.splits import Splits, splits_from_files, stratified_splits
from fppmo_ray.training.steps import StepTraining, train_steps

__all__ = [
    "NETWORKS",
    "PLAIN_COMPUTE",
    "WHOLE",
    "Augmentation",
    "Batch",
    "CentreCrop",
    "ComputeConfig",
    "DType",
    "Dataset",
    "DatasetName",
    "EpochReport",
    "ImageArrays",
    "ImageFiles",
    "ImageSet",
    "Images",
    "Interface",
    "Metrics",
    "PreparedInputs",
    "Preprocessing",
    "RandomResizedCrop",
    "Recipe",
    "Schedule",
    "Seed",
    "Shard",
    "Splits",
    "Squash",
    "StepTraining",
    "TrainingState",
    "Transform",
    "View",
    "autocast",
    "build_network",
    "build_torchvision_network",
    "capture",
    "evaluate",
    "example_batch",
    "fine_tune",
    "fold_batchnorm",
    "interface_from_json",
    "interface_of",
    "keep_freed_memory",
    "lay_out",
    "load_dataset",
    "load_image_folder",
    "load_imagenet",
    "load_weights",
    "native_dtype",
    "open_images",
    "recalibrate_batchnorm",
    "source_of",
    "splits_from_files",
    "state_from_bytes",
    "state_to_bytes",
    "stratified_splits",
    "torchvision_source",
    "train_epoch",
    "train_steps",
    "transform_of",
]
