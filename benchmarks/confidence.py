"""How sure are matches, and how hubs are kept down: the figures behind `clipmatch.calibration`.

    python benchmarks/confidence.py [--model NAME] --captions FILE [--images DIR] --dev-split FILE --train-split FILE

Fits on one half of the dev pictures and measures on the other, both ways round, for several seeds. Prints tables:

- reliability and expected calibration error, over simulated collections of several sizes, and what each part of the
  evidence contributes; where a threshold puts the queries without an answer, and the right best answers;
- three more kinds of queries without an answer: sentences about things that the pictures don't show, captions asked
  of drawn scenes instead of photographs, and short queries ("a dog") once all that show it are taken away;
- short queries that many pictures answer, judged by what the pictures' captions mention;
- recall with hubs kept down: QB-Norm (Bogolin et al., CVPR 2022), NNN (Chowdhury et al., EMNLP 2024) and the
  probability itself, each tuned on one half of the dev pictures and measured on the other.

Pictures are embedded once and remembered, so a second run takes a minute or two.
"""

import argparse
import json
import re
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from clipmatch import calibration_fit as cal
from clipmatch.data import content_hash, load_captions, select_split
from clipmatch.embedder import load_model
from clipmatch.evaluation import RECALLS, bootstrap_interval
from clipmatch.exclusion_fit import find_concepts
from clipmatch.scenes import generate

# Things that captioned photographs of people, dogs and sports hardly show. Replace it for another kind of pictures.
FOREIGN = """\
a bowl of ramen with a boiled egg; an X-ray of a broken wrist; a bar chart of quarterly sales; the rings of Saturn;
a stained-glass window in a cathedral; a rocket lifting off from the launch pad; a cup of coffee with latte art; a
screenshot of an error message; a plate of sushi with chopsticks; a printed circuit board with green solder; a snail
on a lettuce leaf; a stack of gold coins; a page of handwritten sheet music; a microscope image of blood cells; a
steam locomotive crossing a viaduct; the northern lights above a frozen lake; a slice of chocolate cake with
cherries; a passport and boarding passes; an empty lecture hall; a penguin colony on the ice; a giraffe eating from
a tall tree; a grand piano on a concert stage; a wedding ring in a velvet box; a basket of fresh tomatoes; a wind
turbine in a wheat field; a satellite photograph of a hurricane; a chess board in the middle of a game; a lighthouse
in a storm at night; a dripping bathroom tap; an old typewriter with a sheet of paper; a bookshelf full of
leather-bound volumes; a field of sunflowers; a container ship in the harbour; a pot of basil by the sink; a
hospital bed with a heart monitor; a tax form with a signature; a close-up of a honeybee on lavender; a jar of
pickled cucumbers; the Eiffel Tower at dusk; an elephant with its calf; the surface of the moon with craters; a
cactus in a clay pot; a server room with blinking lights; an owl in a hollow tree; a pair of reading glasses on a
newspaper; a loaf of sourdough bread; a goldfish in a round bowl; a diagram of the human heart; a pile of poker
chips; a suspension bridge in fog; a butterfly with blue wings; a jar of honey with a wooden spoon; a volcano
spewing lava; a supermarket shelf full of cereal; an astronaut floating outside a space station; a map of the
underground railway; a bathroom sink with a round mirror; a dentist's chair; a marble statue of an emperor; a pile
of autumn pumpkins; a fountain pen on a contract; a sleeping hamster in its wheel; a washing machine with the door
open; a tray of fried eggs and bacon; a skyscraper made of glass; an aeroplane cockpit with its instruments; a
whiteboard covered with equations; a spider in its web with dew; a crocodile on a muddy bank; a kettle of boiling
water; a clock tower striking noon; a crossword puzzle half filled in; a greenhouse full of orchids; a diamond
necklace; an oil rig at sunset; a koala in a eucalyptus tree; a keyhole in a wooden door; a courtroom with a judge;
a chandelier in a ballroom; a row of test tubes in a laboratory; a library card catalogue; a spiral galaxy; a lemon
cut in half; a porcelain teapot with roses; a ballet dancer's shoes; a terracotta roof with solar panels; a hive
frame covered with wax cells; a bicycle lock and a key; a wall clock with Roman numerals; a can of paint with a
brush; an aquarium with coral and clownfish; a windmill among tulips; a parrot on a perch; a hard disk taken apart;
a rack of lamb with rosemary; a thermometer showing fever; a mousetrap with a piece of cheese; a mosque with four
minarets; a bonsai tree on a table; a receipt from a restaurant""".replace("\n", " ").split("; ")

# What a person types -> words by which a caption says so.
PHRASES = {
    "a dog": r"dogs?|pupp(y|ies)|poodles?|greyhounds?|terriers?|retrievers?|collies?|shepherds?|hounds?",
    "two dogs playing": r"two .*(dogs|puppies)|dogs .*(play|fight|wrestl|chas)\w*",
    "a horse": r"horses?|pony|ponies|bronco",
    "a cat": r"cats?|kittens?",
    "a bird": r"birds?|seagulls?|ducks|goose|geese|pigeons?|swan|hawk|eagle|owl",
    "snow": r"snow\w*|ski|skis|skier\w*|skiing",
    "a beach": r"beach\w*|shore|seashore|coast",
    "a swimming pool": r"pools?",
    "a bicycle": r"bikes?|bicycles?|bikers?|biking|cycl\w*|bicycl\w*|tricycles?",
    "a motorcycle": r"motorcycles?|motorbikes?|motorcyclist|dirt ?bikes?|motocross",
    "a skateboarder": r"skateboard\w*|skater\w*",
    "a surfer on a wave": r"surf(er|ers|ing|board)?",
    "a rock climber": r"rock ?climb\w*|climb\w* .*(rock|cliff|wall)\w*|(rock|cliff|wall)\w* .*climb\w*|rappel\w*",
    "a soccer game": r"soccer",
    "a basketball player": r"basketball",
    "an American football player": r"football",
    "a baseball game": r"baseball|softball",
    "a tennis player": r"tennis",
    "ice hockey": r"hockey",
    "a baby": r"bab(y|ies)|infants?|toddlers?|newborn",
    "a child on a swing": r"swings?|swinging",
    "a child on a slide": r"slides?|sliding",
    "a trampoline": r"trampolines?",
    "a fountain": r"fountains?",
    "a frisbee": r"frisbees?",
    "a kayak": r"kayak\w*|canoe\w*",
    "a boat on the water": r"boats?|sailboats?|kayak\w*|canoe\w*|rafts?|ferry",
    "a mountain": r"mountain\w*|peaks?|alps",
    "a crowd of people": r"crowds?|crowded|audience|spectators|group of people|many people|protest\w*|parade",
    "a musician with a guitar": r"guitars?|guitarist",
    "a car": r"cars?|taxi|automobile|racecar",
    "a bus": r"bus|buses",
    "a tent": r"tents?",
    "a bench": r"bench(es)?",
    "a river": r"rivers?|streams?|creeks?|brook",
    "a lake": r"lakes?|ponds?",
    "a forest": r"forests?|woods|wooded|jungle",
    "a sunset": r"sunsets?|sunrise|dusk",
    "a bride": r"brides?|wedding|groom",
    "a street in a city": r"streets?|city|sidewalk|downtown|crosswalk",
    "a greyhound race": r"greyhounds?|rac(e|es|ing) .*dogs?|dogs? .*rac(e|es|ing)",
    "a snowboarder in the air": r"snowboard\w*",
    "a hot air balloon": r"hot air",
    "an umbrella": r"umbrellas?|parasol",
    "a golfer": r"golf\w*",
}


def embed(model, rows):
    """Captioned pictures -> picture rows, caption rows, owners, captions; unreadable pictures are left out."""
    images = model.embed_images([row.path for row in rows])
    kept = set(images.paths)
    rows = [row for row in rows if row.path in kept]
    captions = [caption for row in rows for caption in row.captions]
    owner = np.repeat(np.arange(len(rows)), [len(row.captions) for row in rows])
    return images.rows, model.embed_texts(captions, progress=True), owner, captions


def mentions(captions, owner, pictures):
    """[phrases, pictures]: how many captions of each picture mention what each phrase names."""
    counts = np.zeros((len(PHRASES), pictures), int)
    for place, words in enumerate(PHRASES.values()):
        pattern = re.compile(rf"\b({words})\b", re.IGNORECASE)
        np.add.at(counts[place], owner, [bool(pattern.search(caption)) for caption in captions])
    return counts


def halves_of(dev, seeds):
    """(seed, rows to fit on, rows to measure on), both ways round for each seed."""
    for seed in range(seeds):
        order = np.random.default_rng(seed).permutation(len(dev[0]))
        first, second = (cal.only(half, *dev) for half in np.array_split(order, 2))
        yield seed, first, second
        yield seed, second, first


# Confidence


def fit(rows, bank, alike):
    return replace(cal.fit(*rows, bank, fingerprint="benchmark"), alike=alike)


def confidence(dev, bank, seeds):
    """Each part of the evidence left out in turn -> figures, pooled over seeds and halves."""
    none = np.zeros_like(bank.pictures), np.zeros_like(bank.captions)
    banks = {
        "cosine alone": cal.Bank(*none),
        "and the query's background": cal.Bank(bank.pictures, none[1]),
        "and the picture's background": cal.Bank(none[0], bank.captions),
        "all": bank,
    }
    alike, sizes = cal.likeness(bank.pictures), cal.gallery_sizes(len(dev[0]) // 2)
    found = {}
    for name, part in banks.items():
        answers = [
            cal.ask(fit(here, part, alike), *there, sizes=sizes, seed=seed)
            for seed, here, there in halves_of(dev, seeds)
        ]
        found[name] = cal.figures_of(cal.join(answers))
        found[name]["frontier"] = frontier(cal.join(answers))
    return found


def frontier(answers):
    """For each size: at thresholds from 0.05 to 0.9, shares of right best answers kept and of absent ones silenced."""
    curves = {}
    for size in np.unique(answers.size):
        part = answers.among(answers.size == size)
        right, absent = part.probability[part.right], part.probability[~part.present]
        steps = [0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
        if len(right):
            curves[str(size)] = [[at, float((right >= at).mean()), float((absent < at).mean())] for at in steps]
    return curves


def best_probabilities(calibration, query_rows, gallery):
    background = calibration.background(gallery)
    return np.array([calibration.probabilities(row, gallery, background).max() for row in query_rows])


def foreign(dev, bank, foreign_rows, drawn_rows, seeds):
    """Queries of another domain, and a collection of another kind -> share answered with nothing, by threshold."""
    steps, found = [0.1, 0.2, 0.3, 0.5], {}
    alike = cal.likeness(bank.pictures)
    for seed, here, (images, texts, _) in halves_of(dev, seeds):
        calibration, rng = fit(here, bank, alike), np.random.default_rng(seed)
        for size in cal.gallery_sizes(len(images)):
            gallery = images[rng.permutation(len(images))[:size]]
            found.setdefault(f"foreign sentences, {size} pictures", []).append(
                best_probabilities(calibration, foreign_rows, gallery)
            )
        asked = texts[rng.permutation(len(texts))[:200]]
        found.setdefault(f"dev captions, {len(drawn_rows)} drawn scenes", []).append(
            best_probabilities(calibration, asked, drawn_rows)
        )
    return {
        name: {str(at): float((np.concatenate(parts) < at).mean()) for at in steps} for name, parts in found.items()
    }


def phrases(dev, bank, phrase_rows, counts, seeds):
    """Short queries, true of a picture if two of its captions say so, not judged if one does -> figures."""
    images, alike, found = dev[0], cal.likeness(bank.pictures), {}
    for seed in range(seeds):
        order = np.random.default_rng(seed).permutation(len(images))
        half = len(order) // 2
        calibration = fit(cal.only(order[:half], *dev), bank, alike)
        for size in (min(50, half), half):
            chosen = order[half : half + size]
            for row, count in zip(phrase_rows, counts[:, chosen], strict=True):
                sure = count != 1
                gallery, true = images[chosen[sure]], count[sure] >= 2
                if not true.any() or true.all():
                    continue
                chances = calibration.probabilities(row, gallery)
                absent = calibration.probabilities(row, gallery[~true]).max()
                found.setdefault(size, []).append((chances.max(), true[chances.argmax()], absent))
    result = {}
    for size, rows in found.items():
        best, right, absent = map(np.array, zip(*rows, strict=True))
        result[f"{size} pictures"] = {
            "queries": len(rows),
            "right": float(right.mean()),
            "mean probability": float(best.mean()),
            "ece": cal.reliability(best, right)[1],
            "kept@0.5": float((best[right] >= 0.5).mean()) if right.any() else None,
            "kept@0.2": float((best[right] >= 0.2).mean()) if right.any() else None,
            "nothing@0.5": float((absent < 0.5).mean()),
            "nothing@0.2": float((absent < 0.2).mean()),
        }
    return result


# Hubness


def qb_norm(scores, bank_scores, beta):
    """QB-Norm with dynamic inverted softmax: queries whose best picture is a hub of the bank are normalised.

    scores [m, n], of a bank [c, n] -> [m, n]; each row is only compared within itself.
    """
    hub = np.zeros(scores.shape[1], bool)
    hub[bank_scores.argmax(axis=1)] = True
    weight = np.exp(beta * bank_scores).sum(axis=0)
    normalised = np.exp(beta * scores) / weight
    return np.where(hub[scores.argmax(axis=1)][:, None], normalised, scores)


def bias(bank_scores, count):
    """NNN: the mean of a picture's scores with the nearest bank queries, [c, n] -> [n]."""
    count = min(count, len(bank_scores))
    return np.partition(bank_scores, -count, axis=0)[-count:].mean(axis=0)


def ranks(scores, owner):
    own = scores[np.arange(len(owner)), owner]
    return (scores >= own[:, None]).sum(axis=1)


def hubness(dev, train, bank):
    """Rows of recall on all dev pictures; settings are chosen on one half's captions and used on the other half's."""
    images, texts, owner = dev
    scores, bank_scores = texts @ images.T, train[1] @ images.T
    biases = {count: bias(bank_scores, count) for count in (16, 64, 128, 256)}
    methods = {
        "QB-Norm": {f"beta {beta}": (qb_norm, bank_scores, beta) for beta in (2, 5, 10, 20, 40)},
        "NNN": {
            f"k {k}, alpha {a}": (lambda s, b, a: s - a * b, biases[k], a) for k in biases for a in (0.25, 0.5, 0.75)
        },
    }
    places = {"cosine": ranks(scores, owner)}
    chosen = {}
    order = np.random.default_rng(0).permutation(len(images))
    parts = np.array_split(order, 2)
    places["probability"] = np.zeros(len(texts), int)
    for here, there in (parts, parts[::-1]):
        calibration = fit(cal.only(here, *dev), bank, cal.likeness(bank.pictures))
        background, asked = calibration.background(images), np.flatnonzero(np.isin(owner, there))
        chances = np.stack([calibration.probabilities(texts[query], images, background) for query in asked])
        places["probability"][asked] = ranks(chances, owner[asked])
    for name, settings in methods.items():
        tried = {label: ranks(method(scores, *rest), owner) for label, (method, *rest) in settings.items()}
        places[name] = np.zeros(len(texts), int)
        for here, there in (parts, parts[::-1]):
            seen, asked = np.isin(owner, here), np.isin(owner, there)
            best = max(tried, key=lambda label: sum((tried[label][seen] <= k).mean() for k in RECALLS))
            places[name][asked] = tried[best][asked]
            chosen.setdefault(name, []).append(best)
    return {"chosen": chosen, "rows": {name: recalls(place, places["cosine"], owner) for name, place in places.items()}}


def recalls(place, plain, owner):
    """Recall, and how far it is from that of the plain cosine, with the difference's 95 % interval over pictures."""
    row = {f"recall@{k}": float((place <= k).mean()) for k in RECALLS}
    for k in RECALLS:
        gained = (place <= k).astype(float) - (plain <= k)
        row[f"gain@{k}"] = [float(gained.mean()), *paired_interval(gained, owner)]
    row["interval"] = {str(k): list(bounds) for k, bounds in bootstrap_interval(place, owner).items()}
    return row


def paired_interval(gained, owner, resamples=1000):
    pictures = int(owner.max()) + 1
    sums, counts = np.bincount(owner, gained, pictures), np.bincount(owner, minlength=pictures)
    drawn = np.random.default_rng(0).multinomial(pictures, np.full(pictures, 1 / pictures), resamples)
    low, high = np.percentile((drawn @ sums) / (drawn @ counts), [2.5, 97.5])
    return float(low), float(high)


# Time


def milliseconds(call, rounds=50):
    spent = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        spent.append(time.perf_counter() - began)
    return 1000 * float(np.median(spent))


def timings(calibration, bank_texts, pictures=10_000):
    """Of one query over a collection of random unit rows, what is cached being cached."""
    rng = np.random.default_rng(0)
    gallery = rng.normal(size=(pictures, calibration.dim)).astype(np.float32)
    gallery /= np.linalg.norm(gallery, axis=1, keepdims=True)
    query, bank_scores = gallery[0], bank_texts @ gallery.T
    background, hub = calibration.background(gallery), np.zeros(pictures, bool)
    hub[bank_scores.argmax(axis=1)] = True
    weight, offset = np.exp(20 * bank_scores).sum(axis=0), 0.5 * bias(bank_scores, 64)

    def inverted():
        scores = gallery @ query
        return np.exp(20 * scores) / weight if hub[scores.argmax()] else scores

    return {
        "pictures": pictures,
        "product": milliseconds(lambda: gallery @ query),
        "probabilities": milliseconds(lambda: calibration.probabilities(query, gallery, background)),
        "NNN": milliseconds(lambda: gallery @ query - offset),
        "QB-Norm": milliseconds(inverted),
        "background, once": milliseconds(lambda: calibration.background(gallery), rounds=3),
    }


def report(result):
    print(f"{result['images']} dev pictures, {result['captions']} captions; shares in percent")
    for name, part in result["confidence"].items():
        print(f"\n{name}: expected calibration error {100 * part['ece']:.1f}")
        print("pictures  right  ece   at 0.5: kept  nothing   nothing where 80 are kept (threshold)   most of both")
        for size, row in part["galleries"].items():
            cells = [
                100 * row.get(key, np.nan) for key in ("right", "ece", "kept@0.5", "nothing@0.5", "nothing", "both")
            ]
            line = "{:8s}  {:5.1f}  {:4.1f}          {:5.1f}    {:5.1f}   {:25.1f} ({:.2f})   {:16.1f}"
            print(line.format(size, *cells[:5], row.get("threshold", np.nan), cells[5]))
    print("\nreliability: probability -> what came true (answers)")
    for part in result["confidence"]["all"]["reliability"]:
        print(f"  {100 * part['probability']:5.1f} -> {100 * part['share']:5.1f} ({part['count']})")
    print("\nwithout an answer, of another kind: share that gets nothing, by threshold")
    for name, row in result["foreign"].items():
        print(f"  {name:40s} " + "  ".join(f"{at}: {100 * share:5.1f}" for at, share in row.items()))
    print("\nshort queries")
    for name, row in result["phrases"].items():
        print(f"  {name}: " + ", ".join(f"{key} {value:.2f}" for key, value in row.items() if value is not None))
    print("\ntext -> image recall, percent (gain over the cosine, 95 % interval)")
    for name, row in result["hubness"]["rows"].items():
        cells = [
            f"R@{k} {100 * row[f'recall@{k}']:.1f} ({100 * row[f'gain@{k}'][0]:+.1f}; "
            f"{100 * row[f'gain@{k}'][1]:+.1f} to {100 * row[f'gain@{k}'][2]:+.1f})"
            for k in RECALLS
        ]
        print(f"  {name:10s} " + "  ".join(cells))
    print(f"  chosen: {result['hubness']['chosen']}")
    print("\nmilliseconds a query: " + ", ".join(f"{name} {value:.2f}" for name, value in result["timings"].items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--captions", required=True)
    parser.add_argument("--images")
    parser.add_argument("--dev-split", required=True)
    parser.add_argument("--train-split", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write the calibration of all of dev there")
    arguments = parser.parse_args()
    model = load_model(arguments.model)
    rows = load_captions(arguments.captions, arguments.images).rows
    dev_rows, train_rows = (select_split(rows, split) for split in (arguments.dev_split, arguments.train_split))
    some = np.sort(np.random.default_rng(0).permutation(len(train_rows))[: cal.BANK])
    *dev, captions = embed(model, dev_rows)
    *train, _ = embed(model, [train_rows[place] for place in some])
    with tempfile.TemporaryDirectory() as scratch:
        folder = generate(Path(scratch) / "scenes", n_train=80, n_dev=20, progress=False)
        drawn = model.embed_images(sorted(folder.rglob("*.jpg")), progress=False).rows
    bank = cal.make_bank(*train)
    split_hash = content_hash(dev_rows)
    concepts = find_concepts(captions, dev[2], model.embed_texts)
    calibration = cal.calibrate(*dev, bank, concepts=concepts, fingerprint=model.fingerprint, split_hash=split_hash)
    result = {
        "model": model.fingerprint,
        "split_hash": split_hash,
        "images": len(dev[0]),
        "captions": len(captions),
        "seeds": arguments.seeds,
        "weights": list(calibration.weights),
        "alike": calibration.alike,
        "confidence": confidence(dev, bank, arguments.seeds),
        "foreign": foreign(dev, bank, model.embed_texts(FOREIGN), drawn, arguments.seeds),
        "phrases": phrases(
            dev, bank, model.embed_texts(list(PHRASES)), mentions(captions, dev[2], len(dev[0])), arguments.seeds
        ),
        "hubness": hubness(dev, train, bank),
        "timings": timings(calibration, train[1]),
    }
    report(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    if arguments.save:
        print(f"calibration: {calibration.save(arguments.save)}")


if __name__ == "__main__":
    main()
