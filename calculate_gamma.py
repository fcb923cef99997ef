"""SD step 4: the thresholds gamma_c and gamma_p from the FCT values of step 3 (paper section 4.1).

--auto proposes, beside those of the ratios, thresholds found in the values (not in the paper). Prints both, and the
command of step 5 that uses them; writes them to <epoch>_gamma.json beside the checkpoint.
"""

from types import SimpleNamespace

from utils import args
from utils.checkpoints import IDENTITY, refuse_other
from utils.errors import run_script
from utils.fct import fct_path, load_fct, sd_path
from utils.files import read_record
from utils.manifest import write_options
from utils.paths import python, quoted, shown
from utils.separation import gammas_of_distribution, gammas_of_ratios


def get_parser():
    parser = args.Parser(__doc__)
    args.add_data_options(parser)
    args.add_attack_options(parser)
    args.add_ratio_options(parser)
    parser.add_argument(
        "--auto",
        action="store_true",
        help="not in the paper: thresholds, and ratios, from two groups in the values, where there are two",
    )
    parser.add_argument(
        "--checkpoint_load", type=args.file, help="the checkpoint given to step 3; default: step 2's last"
    )
    return parser


def main(argv=None):
    opt = args.parse(get_parser(), argv)
    path, _ = sd_path(opt)  # where it is given, the values beside it are all that is needed
    values, record = fct_path(path, "all.txt"), read_record(fct_path(path, "fct.json")) or {}
    # A path that is given says which values are meant: the document gives step 4 the checkpoint alone.
    named = [name for name in IDENTITY if not opt.checkpoint_load or getattr(opt, name) != opt.defaults[name]]
    refuse_other(record.get("options", {}), opt, shown(values), named)
    # Step 5 needs the options too, and so does step 3 where it has not been run.
    known = record.get("options") or (read_record(path.with_name("options.json")) or {}).get("options")
    made_with = args.of_record(known) if opt.checkpoint_load and known else opt
    command = f"{python('calculate_consistency.py')} {args.attack_arguments(made_with)}"
    fct = load_fct(path, f"{command} --checkpoint_load {quoted(path)}")
    low, high = gammas_of_ratios(fct, opt.clean_ratio, opt.poison_ratio)
    found, clean_ratio, poison_ratio = {"gamma_low": low, "gamma_high": high}, opt.clean_ratio, opt.poison_ratio
    proposal = gammas_of_distribution(fct) if opt.auto else None
    if proposal:
        print(f"by the ratios: gamma_low {low!r}, gamma_high {high!r}")
        found |= {"of_ratios": [low, high], **proposal}
        low, high = proposal["gamma_low"], proposal["gamma_high"]
        clean_ratio, poison_ratio = (float(f"{proposal[name]:.3g}") for name in ("clean_ratio", "poison_ratio"))
        print(f"Two groups of values (the valley between them has {proposal['valley']:.2f} of the lower peak): "
              f"clean_ratio {clean_ratio}, poison_ratio {poison_ratio}")  # fmt: skip
    elif opt.auto:
        print("The values fall into no two groups, so those of the ratios stay")
    recorded = SimpleNamespace(**vars(opt) | vars(made_with))
    write_options(fct_path(path, "gamma.json"), recorded, step="calculate_gamma", inputs=[values], **found)
    print(f"gamma_low {low!r}")
    print(f"gamma_high {high!r}")
    print(
        f"{(fct <= low).sum()} of {len(fct)} samples have FCT <= gamma_low, {(fct >= high).sum()} have FCT >= gamma_high"
    )
    options = f"{args.attack_arguments(made_with)}{args.fct_arguments(record.get('options', {}))}"
    print(f"Next: {python('separate_samples.py')} {options} --clean_ratio {clean_ratio} --poison_ratio {poison_ratio} "
          f"--gamma_low {low!r} --gamma_high {high!r} --checkpoint_load {quoted(path)}")  # fmt: skip


if __name__ == "__main__":
    run_script(main)
