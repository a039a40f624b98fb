#!/usr/bin/env bash
# Makes src/abliterate/report/html/echarts.min.js (the parts of Apache ECharts that the report draws with, in one file),
# echarts.LICENSES.txt beside it, and echarts.json, which says what they were made of and what their hashes are.
# Needs node and npm, and their registry. Run again to take another version.
set -euo pipefail
ECHARTS=6.1.0
ESBUILD=0.28.2
target=$(cd "$(dirname "$0")/.." && pwd)/src/abliterate/report/html
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
npm init --yes >/dev/null
npm install --silent --no-audit --no-fund "echarts@$ECHARTS" "esbuild@$ESBUILD"
cat >entry.js <<'JS'
import { use, init, getInstanceByDom } from "echarts/core";
import { CustomChart, HeatmapChart, LineChart, ScatterChart } from "echarts/charts";
import { AriaComponent, GridComponent, LegendComponent, MarkLineComponent, TooltipComponent,
         VisualMapContinuousComponent } from "echarts/components";
import { SVGRenderer } from "echarts/renderers";
use([CustomChart, HeatmapChart, LineChart, ScatterChart, AriaComponent, GridComponent, LegendComponent,
     MarkLineComponent, TooltipComponent, VisualMapContinuousComponent, SVGRenderer]);
export { init, getInstanceByDom };
JS
cat >banner.txt <<TXT
/*! Apache ECharts $ECHARTS, https://echarts.apache.org. Licensed to the Apache Software Foundation (ASF) under one or more
 * contributor license agreements; the ASF licenses it under the Apache License, Version 2.0,
 * https://www.apache.org/licenses/LICENSE-2.0. It includes ZRender (BSD-3-Clause, Baidu Inc.) and tslib (0BSD, Microsoft).
 * Texts of these licences: echarts.LICENSES.txt. A build of the parts that are used, made by scripts/vendor_echarts.sh. */
TXT
npx esbuild entry.js --bundle --minify --format=iife --global-name=echarts --legal-comments=none --charset=ascii \
    --banner:js="$(cat banner.txt)" --log-level=warning --outfile=echarts.min.js
grep -q "</script" echarts.min.js && { echo "the build holds </script and cannot stand in a page" >&2; exit 1; }
mv echarts.min.js "$target/"
for file in echarts/NOTICE echarts/LICENSE zrender/LICENSE tslib/LICENSE.txt; do
    printf '==== %s ====\n\n' "$file"
    cat "node_modules/$file"
    echo
done >"$target/echarts.LICENSES.txt"
python3 - package-lock.json "$target" <<'PY'
import hashlib, json, pathlib, sys

packages = json.loads(pathlib.Path(sys.argv[1]).read_text())["packages"]
target = pathlib.Path(sys.argv[2])
made_of = [
    {"package": f"pkg:npm/{name}@{found['version']}", "integrity": found["integrity"]}
    for name in ("echarts", "zrender", "tslib", "esbuild")
    for found in [packages[f"node_modules/{name}"]]
]
files = ("echarts.min.js", "echarts.LICENSES.txt")
sums = {name: hashlib.sha256((target / name).read_bytes()).hexdigest() for name in files}
said = {
    "made_by": "scripts/vendor_echarts.sh",
    "made_of": made_of,
    "licences": {"echarts": "Apache-2.0", "zrender": "BSD-3-Clause", "tslib": "0BSD", "esbuild": "MIT (not contained)"},
    "sha256": sums,
}
(target / "echarts.json").write_text(json.dumps(said, indent=2) + "\n")
PY
ls -l "$target"/echarts.*
