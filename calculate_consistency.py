"""SD step 3: the FCT value of every training sample (paper section 4.1).

Writes, beside the checkpoint <epoch>.tar, in sample order and one value a line: <epoch>_all.txt, and for plots, where
the ground truth is known, <epoch>_clean.txt and <epoch>_poison.txt; the table <epoch>_fct.csv (index, label, FCT);
<epoch>_fct.json, the settings. Says whether the network shows a backdoor at all (not in the paper; no ground truth), and where
it does, writes <epoch>_order.npy, how like the samples that show it each other one of their class is, for step 5.
"""

from utils import args
from utils.audit import sign_of_backdoor
from utils.errors import run_script
from utils.fct import (
    beside_checkpoint,
    fct_of_network,
    fct_path,
    fct_runtime,
    save_fct,
    sd_checkpoint,
    sd_network,
    settle_fct_precision,
)
from utils.files import sha256
from utils.metrics import auroc
from utils.paths import python, quoted, shown
from utils.poisoning import poison_training_set
from utils.run import claim
from utils.separation import ratio_of


def get_parser():
    parser = args.Parser(__doc__)
    args.add_data_options(parser)
    args.add_attack_options(parser)
    args.add_device_options(parser)
    args.add_fct_options(parser)
    args.add_overwrite_option(parser)
    return parser


def main(argv=None):
    opt, runtime = args.start(get_parser(), argv, fct_runtime)
    path, command = sd_checkpoint(opt)
    digest = sha256(path)  # now: a later run may replace it

    dataset = args.load_data(opt)
    poisoned = poison_training_set(dataset, opt)
    _, model = sd_network(path, command, dataset, poisoned, opt, runtime)
    ignored, option = ["batch_size"], beside_checkpoint(opt)
    record = fct_path(path, "fct.json")
    claim(record, opt, ignored=ignored, option=option, settle=settle_fct_precision, data=dataset.record)
    fct, collapse = fct_of_network(path, model, runtime, dataset, poisoned, opt)
    sign, words, order = sign_of_backdoor(
        model, poisoned.images, poisoned.labels, fct, dataset.classes, dataset.spec, runtime, opt.seed
    )
    save_fct(path, digest, fct, dataset, poisoned, opt, order, sign_of_backdoor=sign, **collapse)
    print(words)
    if order is not None:
        count = int((order >= 0).sum())
        print(
            f"{count} samples are like those that show it. To take these as D_p, in place of FCT (not in the paper), "
            f"with the same --poison_ratio in the steps after it:"
        )
        options = f"{args.attack_arguments(opt)}{args.fct_arguments(vars(opt))}"
        print(f"  {python('separate_samples.py')} {options} --poison_alike --poison_ratio {ratio_of(count, len(order))} "
              f"--checkpoint_load {quoted(path)}")  # fmt: skip
    if poisoned.is_clean is not None:
        print(f"AUROC of FCT (by the ground truth, for evaluation only): {auroc(fct, ~poisoned.is_clean):.6f}")
    print(f"The values are in {shown(fct_path(path, 'all.txt'))}")


if __name__ == "__main__":
    run_script(main)
