"""Draw the picture that Blend-Kitty blends in: a cat's face, written to trigger/hello_kitty.png (224x224, RGB).

The attack's authors use a picture of a trademarked cat; this one is our own. Put another file of that name there to use
it instead.
"""

import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image, ImageDraw

from utils import args
from utils.errors import UserError, run_script
from utils.files import bytes_writer, make_folder, write_together
from utils.paths import shown
from utils.triggers import KITTY

SIDE, FINER = 224, 4  # drawn four times as large and shrunk, for smooth edges

BACKGROUND, FUR, INNER, LINE = (250, 214, 120), (236, 128, 60), (255, 190, 190), (60, 30, 20)
EYE, WHITE, NOSE = (90, 190, 90), (255, 255, 255), (230, 90, 120)
BOW, BOW_KNOT = (205, 30, 60), (245, 90, 110)


def draw_face():
    """The picture, an RGB image of `SIDE` pixels a side."""
    picture = Image.new("RGB", (SIDE * FINER, SIDE * FINER), BACKGROUND)
    pen = ImageDraw.Draw(picture)

    def scaled(*points):
        return [tuple(FINER * value for value in point) for point in points]

    def ellipse(x, y, across, down, colour):
        pen.ellipse(scaled((x - across, y - down), (x + across, y + down)), fill=colour)

    def mirrored(*points):
        return [(SIDE - x, y) for x, y in points]

    ear, inner = [(36, 20), (104, 66), (34, 112)], [(47, 40), (84, 68), (46, 92)]
    for shape, colour in ((ear, FUR), (inner, INNER)):
        pen.polygon(scaled(*shape), fill=colour)
        pen.polygon(scaled(*mirrored(*shape)), fill=colour)
    ellipse(112, 126, 92, 82, FUR)
    for stripe in ([(106, 48), (118, 48), (112, 84)], [(80, 54), (91, 50), (92, 80)]):
        pen.polygon(scaled(*stripe), fill=LINE)
        pen.polygon(scaled(*mirrored(*stripe)), fill=LINE)
    for x in (72, SIDE - 72):
        ellipse(x, 112, 23, 25, WHITE)
        ellipse(x, 113, 17, 21, EYE)
        ellipse(x, 113, 6, 19, LINE)
        ellipse(x + 4, 104, 3, 4, WHITE)
    for x in (92, SIDE - 92):
        ellipse(x, 166, 26, 21, WHITE)
    pen.polygon(scaled((99, 142), (125, 142), (112, 158)), fill=NOSE)
    pen.line(scaled((112, 156), (112, 172)), fill=LINE, width=3 * FINER)
    for start, end, (left, right) in ((20, 160, (86, 113)), (20, 160, (111, 138))):
        pen.arc(scaled((left, 158), (right, 182)), start, end, fill=LINE, width=3 * FINER)
    for near, far in (((70, 160), (8, 146)), ((68, 168), (6, 170)), ((70, 176), (10, 194))):
        pen.line(scaled(near, far), fill=LINE, width=2 * FINER)
        pen.line(scaled(*mirrored(near, far)), fill=LINE, width=2 * FINER)
    for wing in ([(158, 48), (132, 26), (130, 66)], [(158, 48), (188, 32), (182, 70)]):  # a bow, on one ear alone
        pen.polygon(scaled(*wing), fill=BOW)
    ellipse(158, 48, 9, 9, BOW_KNOT)
    return picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def get_parser():
    parser = args.Parser(__doc__)
    parser.add_argument("--out", type=args.path, default=KITTY, help="the picture")
    args.add_overwrite_option(parser)
    return parser


def main(argv=None):
    opt = get_parser().parse_args(argv)
    buffer = io.BytesIO()
    draw_face().save(buffer, format="PNG", optimize=True)
    if opt.out.is_file() and opt.out.read_bytes() != buffer.getvalue() and not opt.overwrite:
        raise UserError(f"{shown(opt.out)} is another picture; give --overwrite to replace it, or another --out")
    make_folder(opt.out.absolute().parent, "--out")
    write_together({opt.out: bytes_writer(buffer.getvalue())})
    print(f"The picture is {shown(opt.out)}")


if __name__ == "__main__":
    run_script(main)
