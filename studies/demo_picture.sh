# The picture at the top of the README: the report page that `make demo` leaves, as Chromium draws it.
#
#     sh studies/demo_picture.sh [PAGE] [OUT]
set -eu
page=${1:-runs/demo/report.html} out=${2:-studies/demo.png} profile=$(mktemp -d)
chromium --headless --no-sandbox --disable-gpu --no-first-run --disable-sync --disable-background-networking \
    --user-data-dir="$profile" --hide-scrollbars --window-size=1000,1075 --virtual-time-budget=5000 \
    --screenshot="$out" "file://$(realpath "$page")"
rm -r "$profile"
