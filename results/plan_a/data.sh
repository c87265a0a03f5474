#!/usr/bin/env bash
# Download the text of plan A, and preprocess it to token files with one token for each byte. The text comes from two Debian packages:
# an essay (anarchism) and the manuals of the Linux kernel (linux-doc-6.1). The repository contains none of this text.
#
# Versions and checksums are pinned, so every repetition reads the same bytes. If Debian no longer has a version, the script ends
# with an error.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
build=build/plan_a
mkdir -p $build
cat > $build/sums <<'SUMS'
cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948  anarchism_15.3-3_all.deb
0d843674607703b9ef8c1db5e715c38ed52ff23574feabfe0d961d552126859f  linux-doc-6.1_6.1.176-1_all.deb
SUMS
if [ ! -s $build/faq_text_document.idx ] || [ ! -s $build/kernel_text_document.idx ]; then
  (cd $build && for wanted in anarchism=15.3-3 linux-doc-6.1=6.1.176-1; do
    ls "${wanted%%=*}"_*.deb > /dev/null 2>&1 || apt-get download "$wanted"
  done && sha256sum --check sums)
  for package in "$build"/*.deb; do dpkg-deb -x "$package" "$build/files"; done
  python results/plan_a/corpus.py $build/files/usr/share/doc $build
  for name in faq kernel; do
    mhr preprocess --input $build/$name.jsonl --output-prefix $build/$name --tokenizer-type ByteTokenizer --append-eod
  done
fi
