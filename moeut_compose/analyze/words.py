"""What the report says beside each figure: the question, what is shown, how to read it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Words:
    """The text of one figure."""

    section: str
    title: str
    question: str
    shows: str
    reading: str


DEPTH, STREAM, EXPERTS, HALTING = "Depth", "Residual stream", "Experts", "Halting"
SECTIONS = (DEPTH, STREAM, EXPERTS, HALTING)

WORDS = {
    "loss_by_repeats": Words(
        DEPTH,
        "Loss by number of passes",
        "Does each pass help, and does the model bear more passes than it was trained with?",
        "Cross entropy on held-out text when one stage runs fewer or more passes than in training; all "
        "other stages run as trained. The dashed line marks training.",
        "A curve that falls up to the dashed line says that every pass does its share. One that stays "
        "flat before the line says that the last passes do little. Beyond the line, a flat curve means "
        "that the layers have become a stable iteration, a rising one that they count on their number. "
        "Stages with weights of their own for each pass cannot run more.",
    ),
    "residual": Words(
        STREAM,
        "Size of the stream and of the updates",
        "Which applications change the representation most?",
        "Above, the root mean square over channels of the residual stream after each application. Below, "
        "how far the layer moved it, and the size of what mixer and feedforward returned, all relative to "
        "the stream before.",
        "A letter is a set of weights, the number is the pass. A growing stream with shrinking relative "
        "updates is usual without a norm on the stream (pre and peri placement); with post norm the "
        "stream keeps its size. The same letter with very different updates in different passes does "
        "different work in each.",
    ),
    "similarity": Words(
        STREAM,
        "Cosine between applications",
        "Do the passes repeat each other, or does each add something of its own?",
        "The mean cosine, over tokens, of the states after two applications (left) and of the updates "
        "that they made (right).",
        "Right: values near 1 between passes of one letter mean that a pass pushes where the pass before "
        "pushed; near 0 it adds something new; below 0 it takes back. Left: states of neighbouring passes "
        "near 1 everywhere mean that later passes hardly matter.",
    ),
    "load": Words(
        EXPERTS,
        "Load",
        "Are all experts used?",
        "Each row is an application, each column an expert, ordered in each row from the most to the "
        "least used. White is an even share, orange more, violet less. Heads that choose on their own "
        "stand in one row.",
        "A row that is pale from end to end is balanced. A dark violet end is made of idle experts: in "
        "one pass only, they may be specialists of another; in all rows of a letter they are dead weight.",
    ),
    "expert_depth": Words(
        EXPERTS,
        "At which depth experts work",
        "When layers are shared, does an expert serve one depth or all of them? (The question that "
        "sharing experts over depth, as in arXiv:2405.16039, raises first.)",
        "Each column is an expert of a shared layer, its uses divided over the passes; columns are "
        "ordered by mean pass.",
        "Columns of one colour belong to experts that serve all passes alike. Bright cells belong to "
        "specialists of a pass. A bright diagonal says that routing splits the shared layer into nearly "
        "separate layers; a plain field, that depth makes no difference to it.",
    ),
    "sharpness": Words(
        EXPERTS,
        "Sharpness of routers",
        "How decided is a router about one token, and how even over all of them?",
        "Above, entropy relative to its maximum: of a router's softmax for one token (solid) and of the "
        "use of experts over all tokens (dotted). Below, the largest over the median probability for a "
        "token.",
        "Good routing is even over tokens and decided for each: dotted lines near 1, solid lines below "
        "them. Solid lines at 1 and a ratio near 1 mean that the choice hardly depends on the token. A "
        "flat load alone does not prove healthy routing, and this ratio was proposed to tell "
        "(arXiv:2609.35751).",
    ),
    "overlap": Words(
        EXPERTS,
        "Overlap of expert sets between passes",
        "Does a token meet the same experts again in the next pass?",
        "The experts that a token uses in two passes through the same layer: intersection over union, "
        "mean over tokens. The title gives the same figure for unrelated tokens, which is what uneven use "
        "alone would give.",
        "Values near 1 mean that a token takes the same way in each pass, values near those of unrelated "
        "tokens that each pass chooses anew. Grey: no token came that deep. For looped sparse layers it "
        "was reported that 25 to 53 % of tokens use entirely different experts on the second visit "
        "(arXiv:2605.09165).",
    ),
    "token_or_context": Words(
        EXPERTS,
        "Token or context?",
        "Is the choice made by the token alone, or by what stands around it?",
        "Overlap of the expert sets at two occurrences of the same token in one window (solid), and of "
        "two unrelated tokens (dotted), for every application.",
        "At 1, the token alone decides, as it must in a first layer that has seen nothing else. The "
        "nearer a solid line comes to its dotted one, the more the context decides. Compare the passes of "
        "one letter: does the choice become more contextual with depth?",
    ),
    "diversity": Words(
        EXPERTS,
        "Token diversity of experts",
        "Is an expert a specialist of a few tokens or a generalist?",
        "Each point is an expert: how often it is used against the effective number of different tokens "
        "that it works for (the exponential of their entropy). The dashed line is the text itself. "
        "Of more than eight members the first are dark and the last bright.",
        "Points on the dashed line see the text as it is. Points far below have a small vocabulary of "
        "their own; the tables at the end name it. Experts that are rarely used cannot be diverse, so "
        "read points at the same place of the horizontal axis.",
    ),
    "co_occurrence": Words(
        EXPERTS,
        "Experts chosen together",
        "Do experts form teams?",
        "How often two experts are chosen for the same token, relative to independent choices with the "
        "same use in each pass. Experts are ordered so that those that go together are neighbours. One is "
        "added to both counts, so that rare pairs stay pale.",
        "Orange blocks on the diagonal are teams, violet areas are experts that exclude each other. A "
        "pale picture means that experts are combined freely.",
    ),
    "halting": Words(
        HALTING,
        "How deep tokens go",
        "Where is computation spent, and do harder tokens get more of it?",
        "Left, the tokens that still run in each pass, and their mean mass that has not halted. Middle, "
        "the expected number of passes of a token, each pass weighed with that mass. Right, the mean loss "
        "of tokens by expected number of passes.",
        "Mass decides what a pass contributes; a token is computed as long as any is left. If all tokens "
        "stand in one bar, the rule does not tell them apart: it has collapsed, or not been trained "
        "enough. A loss that rises with depth says that the model spends passes on hard tokens.",
    ),
    "halting_map": Words(
        HALTING,
        "Depth token by token",
        "Which places of the text get more passes?",
        "The expected number of passes of every token of the first windows.",
        "Vertical stripes would be a matter of position, spots one of words. The text below shows the "
        "first window word by word.",
    ),
}
