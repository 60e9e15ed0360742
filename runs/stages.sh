# Sourced by recipes that train in stages; needs DATA (Images/, captions.txt) and OUT, and is run in the repository.

make --silent setup
export PATH="$PWD/.venv/bin:$PATH"

# train NAME OPTIONS...: a run in OUT/NAME, started or resumed; OPTIONS name the splits
train() {
    local name=$1
    shift
    if [ -f "$OUT/$name/done" ]; then return; fi
    if [ -f "$OUT/$name/last/state.json" ]; then
        clipmatch train --resume --out "$OUT/$name"
    else
        rm -rf "${OUT:?}/$name"
        clipmatch train --captions "$DATA/captions.txt" --images "$DATA/Images" --out "$OUT/$name" "$@"
    fi
    touch "$OUT/$name/done"
}
