"""ST step 3: ACC, ACC_paper, ASR and R-ACC of extractor and classifier (paper section 5).

Prints them and writes them to <classifier>_test.json beside the classifier's checkpoint.
"""

import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torch import nn

from models import SupConResNet, logits_of
from utils import args
from utils.checkpoints import SECURE_IDENTITY, anew_of, latest_of_runs, load_checkpoint, refuse_other_inputs
from utils.dataloader_bd import Normalize, make_test_sets
from utils.errors import UserError, run_script
from utils.files import make_folder, read_record, sha256
from utils.manifest import write_options
from utils.metrics import evaluate
from utils.paths import python, quoted, secure_folder, shown
from utils.poisoning import refuse_other_trigger
from utils.weights import load_weights


def get_parser():
    parser = args.Parser(__doc__)
    args.add_data_options(parser)
    args.add_attack_options(parser)
    args.add_device_options(parser)
    args.add_ratio_options(parser)
    parser.add_argument(
        "--model_ckpt", type=args.file, help="extractor of ST step 1; default: the newest last.pth of these options"
    )
    parser.add_argument(
        "--classifier_ckpt", type=args.file, help="classifier of ST step 2; default: the newest of these options"
    )
    return parser


def own_extractor(classifier_path, digests, taken):
    """--model_ckpt with the extractor that the record beside a classifier names, where that is another than the one ``taken`` and still
    one of the files (``digests``) which the classifier was trained with; else --model_ckpt alone."""
    named = (read_record(classifier_path.with_name("options.json")) or {}).get("ckpt")
    path = classifier_path.parent / named if isinstance(named, str) else None
    # As a rule it is the same, and need not be read.
    other = path and path.is_file() and path.resolve() != taken.resolve()
    known = other and isinstance(digests, list) and sha256(path) in digests
    return f"--model_ckpt {quoted(path.resolve())}" if known else "--model_ckpt"


def main(argv=None):
    opt, runtime = args.start(get_parser(), argv)
    more = args.secure_arguments(opt)
    commands = [f"{python('ST/train_extractor.py')} {more} --cosine", f"{python('ST/train_classifier.py')} {more}"]
    folder = secure_folder(opt)
    extractor_path = opt.model_ckpt or latest_of_runs(folder, "SupCon_*/last.pth", commands[0], "--model_ckpt")
    classifier_path = opt.classifier_ckpt or latest_of_runs(
        folder, "Linear_*/ckpt_epoch_*.pth", commands[1], "--classifier_ckpt"
    )
    extractor_state = load_checkpoint(extractor_path, opt, commands[0], ["train_extractor"], SECURE_IDENTITY)
    classifier_state = load_checkpoint(classifier_path, opt, commands[1], ["train_classifier"], SECURE_IDENTITY)
    on_it = f"--ckpt {shlex.quote(str(extractor_path.absolute()))}"  # in the place of what the command may name
    again = anew_of(classifier_path, "ST/train_classifier.py", commands[1])
    own = own_extractor(classifier_path, classifier_state.get("inputs"), extractor_path)
    again = f"{again} {on_it}; or give its own extractor by {own}"
    refuse_other_inputs(classifier_state, classifier_path, [extractor_path], again)

    dataset = args.load_data(opt)
    refuse_other_trigger(dataset, opt, classifier_state, shown(classifier_path))
    tests = make_test_sets(dataset, opt, runtime)
    if tests is None:
        raise UserError(
            f"{shown(opt.data_root)} has no test images to test on; put some into test/<class>/ (x_test of an .npz)"
        )
    extractor = SupConResNet(opt.model, size=dataset.spec.size)
    classifier = nn.Linear(extractor.encoder.feature_size, dataset.spec.num_classes)
    load_weights(extractor, extractor_state["model"], extractor_path)
    load_weights(classifier, classifier_state["model"], classifier_path)
    extractor, classifier = runtime.place(extractor).eval(), classifier.to(runtime.device)

    normalize = Normalize(dataset.spec, runtime.device)
    result = evaluate(lambda x: logits_of(classifier, extractor.features(x)), tests, normalize, runtime)
    print("  ".join(f"{name} {value:.2f}" for name, value in result.items()))
    make_folder(classifier_path.parent)
    target = classifier_path.with_name(f"{classifier_path.stem}_test.json")
    inputs = [extractor_path, classifier_path]
    write_options(target, opt, step="test", **result, data=dataset.record, inputs=inputs)
    print(f"Written to {shown(target)}")


if __name__ == "__main__":
    run_script(main)
