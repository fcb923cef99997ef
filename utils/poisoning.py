"""What the attacker makes of images of a data set: the triggers, and for CL and SSBA what these need from disk.

What takes a network to make is kept in saved/poisoned_images/, with its settings, and made once.
"""

import hashlib
import json
from functools import partial
from pathlib import Path

import numpy as np

from utils.adversarial import EPSILON, STEP_SIZE, STEPS, load_benign_model, perturb
from utils.checkpoints import latest_checkpoint
from utils.errors import UserError, require_file
from utils.files import BROKEN, atomic_write, load_npz, make_folder, sha256
from utils.paths import arguments, benign_folder, shown
from utils.SSBA.encode_image import encode_images
from utils.triggers import apply_trigger

WORTH_KEEPING = 64  # fewer images are made anew each time


def painter(opt, train):
    """The trigger as a function uint8 (N, H, W, 3) -> new uint8 (N, H, W, 3), without what CL does before it."""
    if opt.trigger_type == "SSBA":
        return partial(encode_images, path=opt.ssba_encoder)
    return partial(apply_trigger, opt.trigger_type, train=train, seed=opt.seed)


def paint(dataset, opt, rows, train):
    """The images ``rows`` of a data set in memory as the attack changes them.

    Args:
        dataset: a `datasets.Dataset`; opt: the options of the attack; rows: int64 (N,), in the training or the test
        set; train: which of the two.

    Returns:
        uint8 (N, H, W, 3).

    Raises:
        UserError: where the attack needs a file that is missing, damaged or of another data set.
    """
    images = dataset.train_images[rows] if train else dataset.test_images[rows]
    paint_all = painter(opt, train)
    if opt.trigger_type == "SSBA" and opt.ssba_images:
        return _encoded_elsewhere(dataset, opt, rows, train)
    if opt.trigger_type == "SSBA":
        settings = {"encoder": sha256(require_file(opt.ssba_encoder, "python tools/train_ssba.py"))}
        return _kept(opt, settings, images, train, lambda: paint_all(images))
    if opt.trigger_type == "fourCornerTrigger" and train:
        return paint_all(_perturbed(dataset, opt, rows, images))
    return paint_all(images)


def _perturbed(dataset, opt, rows, images):
    own = arguments(opt, ["dataset", "model"], ["data_root", "train_images", "seed", "output_root"])
    command = f"python train_clean_withTrans.py {own} --epochs 200"
    path = Path(opt.benign_checkpoint or latest_checkpoint(benign_folder(opt), 200, command))
    settings = {
        "benign_checkpoint": sha256(require_file(path, command)),
        "pgd": [EPSILON, STEP_SIZE, STEPS],
        "seed": opt.seed,
        "rows": hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest(),
    }

    def make():
        model = load_benign_model(path, opt, dataset.spec, command)
        return perturb(model, images, dataset.train_labels[rows], rows, dataset.spec, opt.seed)

    return _kept(opt, settings, images, True, make)


def _encoded_elsewhere(dataset, opt, rows, train):
    if not train and len(opt.ssba_images) < 2:
        raise UserError("--ssba_images has no second file, the encoded test images, which the ASR needs")
    path, whole = Path(opt.ssba_images[0 if train else 1]), dataset.train_images if train else dataset.test_images
    try:
        encoded = np.load(path, allow_pickle=False, mmap_mode="r")
        if not isinstance(encoded, np.ndarray):
            raise ValueError("it is an archive of several arrays")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"--ssba_images: cannot read {shown(path)} as one plain .npy array ({error})") from None
    if encoded.dtype != np.uint8 or encoded.shape != whole.shape:
        raise UserError(
            f"--ssba_images: {shown(path)} holds {encoded.dtype} {encoded.shape}; the {'training' if train else 'test'} "
            f"images of {opt.dataset} are uint8 {whole.shape}, and the encoded ones must be too, in sample order"
        )
    return np.ascontiguousarray(encoded[rows])


def _kept(opt, settings, images, train, make):
    """``make()`` (uint8, of the shape of ``images``), or what an earlier run with the same settings and images kept."""
    if len(images) < WORTH_KEEPING:
        return make()
    content = hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()
    settings = json.dumps(
        {"trigger_type": opt.trigger_type, "train": train, "images": content, **settings}, sort_keys=True
    )
    name = f"{opt.trigger_type}_{'train' if train else 'test'}_{hashlib.sha256(settings.encode()).hexdigest()[:12]}.npz"
    path = opt.output_root / "saved/poisoned_images" / opt.dataset / name
    try:
        kept, made_with = load_npz(path, ("images", "settings"), images.nbytes + 4096)
        if str(made_with) == settings and (kept.dtype, kept.shape) == (images.dtype, images.shape):
            return kept
    except BROKEN:
        pass  # none kept, or damaged: make it again
    print(
        f"Making {len(images)} {'training' if train else 'test'} images of {opt.trigger_type}; they are kept in {shown(path)}"
    )
    result = make()
    try:
        make_folder(path.parent)
        with atomic_write(path) as file:
            np.savez(file, images=result, settings=settings)
    except UserError as error:
        print(f"They could not be kept: {error}")
    return result
