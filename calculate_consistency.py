"""SD step 3: the FCT value of every training sample (paper section 4.1).

Writes, beside the checkpoint <epoch>.tar, in sample order and one value a line: <epoch>_all.txt, and for plots
<epoch>_clean.txt and <epoch>_poison.txt; the table <epoch>_fct.csv (index, label, FCT); <epoch>_fct.json, the settings.
"""

from pathlib import Path

from utils import args
from utils.dataloader_bd import poison_training_set
from utils.errors import run_script
from utils.fct import fct_of_checkpoint, fct_path, save_fct, sd_checkpoint
from utils.files import make_folder
from utils.metrics import auroc
from utils.paths import shown


def get_parser():
    parser = args.Parser(__doc__)
    args.add_data_options(parser)
    args.add_attack_options(parser)
    args.add_device_options(parser)
    args.add_tau_options(parser)
    parser.add_argument(
        "--batch_size", type=args.positive_int, default=256, help="images a forward pass; changes no value"
    )
    parser.add_argument("--checkpoint_load", type=Path, help="checkpoint of step 2 (or 1); default: step 2's last")
    return parser


def main(argv=None):
    opt, runtime = args.start(get_parser(), argv)
    path, command = sd_checkpoint(opt)

    dataset = args.load_data(opt)
    poisoned = poison_training_set(dataset, opt)
    fct = fct_of_checkpoint(path, command, dataset, poisoned, opt, runtime)
    make_folder(path.parent)
    save_fct(path, fct, poisoned, opt)
    print(f"AUROC of FCT (by the ground truth, for evaluation only): {auroc(fct, ~poisoned.is_clean):.6f}")
    print(f"The values are in {shown(fct_path(path, 'all.txt'))}")


if __name__ == "__main__":
    run_script(main)
