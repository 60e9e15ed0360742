"""Does excluding exclude? "A but not B" asked of captioned pictures, with a veto and with its alternatives.

    python benchmarks/exclusion.py --data DIR [--model NAME] [--concepts FILE] [--json FILE]

DIR holds captions and pictures; the questions are asked of its dev split, and 1,000 pictures of its train split are the
bank. `exclusion_concepts.json` (replace it for another kind of pictures) says by which words captions name a concept
("named"), and which more general or neighbouring words leave open whether it is there ("open"). A picture shows a
concept if two of its captions name it; it lacks it if none does and none leaves it open. A and B are any two concepts
on which captions agree (of two captions of one picture, where one names it, the other does too more often than not),
with enough pictures that show both, and that show A and lack B. Wanted are those that lack B; the others are to be
removed.

All is asked of concepts and pictures that the fit has not seen: it uses the other half of the dev pictures (several
halvings, both ways round), and words that the captions agree on, without any that name B.

- veto: `clipmatch.exclusion` as `clipmatch find --not` uses it.
- cosine: a threshold on the cosine with "a photo of B", fitted the same way.
- subtraction: ranked by a - lambda b, cut for each question where as many wanted pictures are kept as the veto keeps.
- wording: ranked by "a photo of A without B", and by A alone, cut the same way.

Two kinds of candidates: all pictures that show A, and those of them that a search for A lists first, as far down as
there are pictures that show A.
"""

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from clipmatch.calibration import Calibration
from clipmatch.calibration_fit import BANK, likeness, make_bank
from clipmatch.data import content_hash, load_captions, split_captions
from clipmatch.embedder import load_model
from clipmatch.exclusion import embed_concept, familiarity, judge
from clipmatch.exclusion_fit import AGREEMENT, Concept, find_concepts, fit_exclusion, pairs_of, removing

CONCEPTS = Path(__file__).with_name("exclusion_concepts.json")
GOAL = 0.9  # of unwanted pictures to be removed
PLENTY = 8  # pictures of each kind that a question needs
FIRST = 5  # the same among the pictures that are listed first
LAMBDAS = (0.3, 0.5, 1.0)
# Words that say nothing of a picture, and things that photographs of people, dogs and sports hardly show.
NONSENSE = ("xqzt", "blorf", "asdfgh", "qwertz", "the", "thing", "nothing", "justice")
FOREIGN = (
    "giraffe",
    "penguin",
    "zebra",
    "pizza",
    "sushi",
    "volcano",
    "submarine",
    "spreadsheet",
    "lighthouse",
    "x-ray",
)


def embed(model, rows):
    """Captioned pictures -> picture rows, captions, the picture of each; unreadable pictures are left out."""
    images = model.embed_images([row.path for row in rows])
    kept = set(images.paths)
    rows = [row for row in rows if row.path in kept]
    captions = [caption for row in rows for caption in row.captions]
    return images.rows, captions, np.repeat(np.arange(len(rows)), [len(row.captions) for row in rows])


# What pictures show


def pattern(words):
    """ "dog, sea*" -> a pattern of these words, also with -s and -es; * stands for any letters."""
    words = [re.escape(word).replace(r"\*", r"\w*") for word in words.split(", ") if word]
    return re.compile(rf"\b(?:{'|'.join(words)})(?:s|es)?\b" if words else r"(?!)", re.IGNORECASE)


def counted(expression, captions, owner):
    counts = np.zeros(int(owner.max()) + 1, int)
    np.add.at(counts, owner, [bool(expression.search(caption)) for caption in captions])
    return counts


def agreement(count, owner):
    """Of two captions of one picture, where one names it: how often the other does."""
    others = (count * (np.bincount(owner, minlength=len(count)) - 1)).sum()
    return float((count * (count - 1)).sum() / others) if others else 0.0


def listed_concepts(listed, captions, owner, embed_texts):
    """The concepts of the list on which these captions agree, and for each the pattern of its names."""
    concepts, names = [], []
    for word, words in listed.items():
        named = pattern(words["named"])
        count, vague = counted(named, captions, owner), counted(pattern(words["open"]), captions, owner)
        if agreement(count, owner) >= AGREEMENT and (count >= 2).sum() >= PLENTY:
            rows = embed_concept(embed_texts, word)
            concepts.append(Concept(word, rows, count >= 2, (count == 0) & (vague == 0)))
            names.append(named)
    return concepts, names


def questions(concepts, least=PLENTY):
    """[(a, b, pictures that show both, pictures that show A and lack B)]: what `pairs_of` finds, and which A it was."""
    found = []
    for a in range(len(concepts)):
        for b in range(len(concepts)):
            for _, both, wanted in pairs_of([concepts[a], concepts[b]], [1]) if a != b else []:
                if min(len(both), len(wanted)) >= least:
                    found.append((a, b, both, wanted))
    return found


def first_of(asked, near_a, concepts):
    """The same questions among the pictures that a search for A lists first."""
    found = []
    for a, b, both, wanted in asked:
        first = np.argsort(-near_a[a], kind="stable")[: int(concepts[a].shown.sum())]
        both, wanted = np.intersect1d(both, first), np.intersect1d(wanted, first)
        if min(len(both), len(wanted)) >= FIRST:
            found.append((a, b, both, wanted))
    return found


# Verdicts on pictures and concepts that the fit has not seen


def halves(count, seed):
    first, second = np.array_split(np.random.default_rng(seed).permutation(count), 2)
    return (first, second), (second, first)


def unseen(words, name, expression):
    """The words of a fit without those that name the concept."""
    own = set(name.lower().split())
    return [word for word in words if not expression.fullmatch(word.word) and word.word not in own]


def verdicts(draft, images, words, concepts, names, seed):
    """How far each listed concept's confidence [k, n] is beyond what is needed, and the same of a plain cosine."""
    beyond, cosine = np.zeros((len(concepts), len(images))), np.zeros((len(concepts), len(images)))
    for here, there in halves(len(images), seed):
        seen = [word.among(here) for word in words]
        for place, (concept, name) in enumerate(zip(concepts, names, strict=True)):
            left = unseen(seen, concept.word, name)
            ready = fitted(draft, images[here], left)
            beyond[place, there] = margin(ready, concept.rows, judge(ready, concept.rows, images[there]))
            plain = np.stack([images[here] @ word.rows[0] for word in left])
            cosine[place, there] = images[there] @ concept.rows[0] - removing(plain, pairs_of(left))
    return beyond, cosine


def fitted(draft, images, words):
    """The draft with an exclusion; ends the run where there is nothing to fit."""
    exclusion = fit_exclusion(draft, images, words)
    if exclusion is None:
        raise SystemExit(f"These captions agree on {len(words)} words, too few; or the model's cosines mean nothing.")
    return replace(draft, exclusion=exclusion)


def margin(calibration, concept_rows, verdict):
    """How far beyond what is needed, in log odds; what the caution for unfamiliar concepts spares is below it."""
    constant, slope = calibration.exclusion.needed
    odds = np.log(verdict.confidence / (1 - verdict.confidence))
    far = odds - constant - slope * familiarity(calibration, concept_rows)
    return np.where(verdict.vetoed, np.maximum(far, 0), np.minimum(far, -1e-9))


# Figures


def shares(asked, scores, cut=0.0):
    """For each question the share of unwanted pictures removed and of wanted ones kept: removed is what reaches cut."""
    removed = [float((scores[b][both] >= cut).mean()) for _, b, both, _ in asked]
    kept = [float((scores[b][wanted] < cut).mean()) for _, b, _, wanted in asked]
    return np.array(removed), np.array(kept)


def ranked(asked, score_of, kept):
    """Higher is listed first: each question's list is cut where it keeps this share of the wanted -> share removed."""
    removed = []
    for (a, b, both, wanted), share in zip(asked, kept, strict=True):
        scores = score_of(a, b)
        stay = round(share * len(wanted))
        cut = np.sort(scores[wanted])[len(wanted) - stay] if stay else np.inf
        removed.append(float((scores[both] < cut).mean()))
    return np.array(removed)


def ideal(asked, scores):
    """Kept if each question had the threshold that removes 90 % of its unwanted pictures."""
    return np.array(
        [float((scores[b][wanted] < np.quantile(scores[b][both], 1 - GOAL)).mean()) for _, b, both, wanted in asked]
    )


def balance(asked, scores):
    """The share that is both removed and kept, where one threshold makes the two the same."""
    cuts = np.quantile(np.concatenate([scores[b] for b in {question[1] for question in asked}]), np.linspace(0, 1, 400))
    return max(min(part.mean() for part in shares(asked, scores, cut)) for cut in cuts)


def interval(values, excluded, resamples=2000):
    """95 % interval of the mean over questions, from resampling the excluded concepts with all their questions."""
    rng, groups = np.random.default_rng(0), [values[excluded == b] for b in np.unique(excluded)]
    sums, sizes = np.array([group.sum() for group in groups]), np.array([len(group) for group in groups])
    drawn = rng.multinomial(len(groups), np.full(len(groups), 1 / len(groups)), resamples)
    low, high = np.percentile((drawn @ sums) / (drawn @ sizes), [2.5, 97.5])
    return [float(low), float(high)]


def summary(asked, removed, kept):
    excluded = np.array([question[1] for question in asked])
    many = np.array([[len(both), len(wanted)] for _, _, both, wanted in asked])
    return {
        "removed": float(removed.mean()),
        "removed_interval": interval(removed, excluded),
        "kept": float(kept.mean()),
        "kept_interval": interval(kept, excluded),
        "removed_pictures": float((removed * many[:, 0]).sum() / many[:, 0].sum()),
        "kept_pictures": float((kept * many[:, 1]).sum() / many[:, 1].sum()),
        "reached": float(((removed >= 0.9) & (kept >= 0.8)).mean()),
    }


def compare(asked, runs, score_of):
    """All methods on the same questions; runs: [(beyond, cosine)] of several halvings, over which shares are means."""
    veto = np.mean([shares(asked, beyond) for beyond, _ in runs], axis=0)  # [2, questions]
    plain = np.mean([shares(asked, cosine) for _, cosine in runs], axis=0)
    found = {"veto": summary(asked, *veto), "cosine": summary(asked, *plain)}
    for name, score in score_of.items():
        found[name] = summary(asked, ranked(asked, score, veto[1]), veto[1])
    return {
        "questions": len(asked),
        "excluded_concepts": len({question[1] for question in asked}),
        "methods": found,
        "balance": float(np.mean([balance(asked, beyond) for beyond, _ in runs])),
        "ideal_kept": float(np.mean([ideal(asked, beyond) for beyond, _ in runs])),
    }, veto


def by_concept(asked, veto, concepts):
    """The veto's shares for each excluded concept, over the questions that exclude it."""
    excluded = np.array([question[1] for question in asked])
    return {
        concepts[b].word: {
            "questions": int((excluded == b).sum()),
            "removed": float(veto[0][excluded == b].mean()),
            "kept": float(veto[1][excluded == b].mean()),
        }
        for b in np.unique(excluded)
    }


def strangers(model, calibration, images, texts):
    """Share of all pictures vetoed for what none of them shows."""
    verdicts_ = {text: judge(calibration, embed_concept(model.embed_texts, text), images) for text in texts}
    return {text: {"vetoed": float(v.vetoed.mean()), "familiar": bool(v.familiar)} for text, v in verdicts_.items()}


def report(result):
    print(f"{result['images']} pictures, {result['captions']} captions; percent, 95 % interval over excluded concepts")
    for title in ("all that show A", "listed first"):
        part = result[title]
        print(f"\n{title}: {part['questions']} questions, {part['excluded_concepts']} excluded concepts")
        print("method             removed             kept                both 90 and 80   pooled: removed  kept")
        for name, row in part["methods"].items():
            low, high = row["removed_interval"]
            cells = f"{100 * row['removed']:5.1f} ({100 * low:.1f}-{100 * high:.1f})".ljust(20)
            low, high = row["kept_interval"]
            cells += f"{100 * row['kept']:5.1f} ({100 * low:.1f}-{100 * high:.1f})".ljust(20)
            pooled = f"{100 * row['removed_pictures']:15.1f} {100 * row['kept_pictures']:5.1f}"
            cells += f"{100 * row['reached']:14.0f}   {pooled}"
            print(f"{name:18s} {cells}")
        print(f"the veto, removed = kept at {100 * part['balance']:.1f}; ", end="")
        print(f"kept at 90 removed, had each question its own threshold: {100 * part['ideal_kept']:.1f}")
    print("\nexcluded concept    questions  removed  kept")
    for word, row in sorted(result["concepts"].items(), key=lambda item: -item[1]["removed"] - item[1]["kept"]):
        print(f"{word:20s} {row['questions']:8d}  {100 * row['removed']:7.1f} {100 * row['kept']:5.1f}")
    for title in ("nonsense", "foreign"):
        cells = [
            f"{word} {100 * row['vetoed']:.0f}{'' if row['familiar'] else '*'}" for word, row in result[title].items()
        ]
        print(f"\n{title}, share of all pictures vetoed (* held for unfamiliar): {', '.join(cells)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, metavar="DIR")
    parser.add_argument("--images", metavar="DIR")
    parser.add_argument("--model")
    parser.add_argument("--concepts", type=Path, default=CONCEPTS, metavar="FILE")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model = load_model(arguments.model)
    splits = split_captions(load_captions(arguments.data, arguments.images))
    some = np.sort(np.random.default_rng(0).permutation(len(splits.train))[:BANK])
    bank_images, bank_captions, bank_owner = embed(model, [splits.train[place] for place in some])
    bank = make_bank(bank_images, model.embed_texts(bank_captions), bank_owner)
    images, captions, owner = embed(model, splits.dev)
    words = find_concepts(captions, owner, model.embed_texts)
    concepts, names = listed_concepts(json.loads(arguments.concepts.read_text()), captions, owner, model.embed_texts)
    draft = Calibration((0.0, 0.0, 0.0, 0.0), likeness(bank.pictures), bank, model.fingerprint)
    runs = [verdicts(draft, images, words, concepts, names, seed) for seed in range(arguments.seeds)]
    near = [images @ concept.rows[0] for concept in concepts]
    asked = questions(concepts)
    if not asked:
        raise SystemExit("No two concepts of the list are together, and apart, in enough of these pictures.")
    without = model.embed_texts([f"a photo of {concepts[a].word} without {concepts[b].word}" for a, b, _, _ in asked])
    places = {(a, b): place for place, (a, b, _, _) in enumerate(asked)}
    scores = {f"a - {part:g} b": (lambda a, b, part=part: subtracted(images, concepts, a, b, part)) for part in LAMBDAS}
    scores['"A without B"'] = lambda a, b: images @ without[places[a, b]]
    scores["A alone"] = lambda a, b: near[a]
    whole, veto = compare(asked, runs, scores)
    first, _ = compare(first_of(asked, near, concepts), runs, scores)
    ready = fitted(draft, images, words)
    result = {
        "model": model.fingerprint,
        "split_hash": content_hash(splits.dev),
        "images": len(images),
        "captions": len(captions),
        "seeds": arguments.seeds,
        "fitted_words": [word.word for word in words],
        "exclusion": vars(ready.exclusion),
        "all that show A": whole,
        "listed first": first,
        "concepts": by_concept(asked, veto, concepts),
        "nonsense": strangers(model, ready, images, NONSENSE),
        "foreign": strangers(model, ready, images, FOREIGN),
    }
    report(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def subtracted(images, concepts, a, b, part):
    query = concepts[a].rows[0] - part * concepts[b].rows[0]
    return images @ (query / np.linalg.norm(query))


if __name__ == "__main__":
    main()
