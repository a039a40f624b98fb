"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("data").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const COLOURS = {
    light: { ink: "#1b2430", dim: "#5a6675", line: "#dde2e8", card: "#ffffff", accent: "#0b6bcb", before: "#6b7785",
             after: "#0b6bcb", random: "#a9690a", harmful: "#c2410c", harmless: "#0b6bcb",
             some: ["#0b6bcb", "#c2410c", "#0f8a6a", "#8a4fc7", "#8a6d00", "#b0306a", "#4a5a6a", "#2a9bb5"],
             ramp: ["#0b3c78", "#3f82c4", "#a8cbe8", "#f3f6f9"] },
    dark: { ink: "#e6eaf0", dim: "#9aa7b7", line: "#2d3643", card: "#181d25", accent: "#5fb0ff", before: "#9aa7b7",
            after: "#5fb0ff", random: "#e0a84a", harmful: "#ff9361", harmless: "#5fb0ff",
            some: ["#5fb0ff", "#ff9361", "#4cc9a4", "#c49bf0", "#d8bd52", "#f08ab8", "#a9b6c4", "#6fd3e8"],
            ramp: ["#bfe0ff", "#4f97da", "#234a70", "#1e2530"] },
  };
  let colour = COLOURS.light;
  const text = (value) => (Math.abs(value) >= 100 ? value.toFixed(0) : String(Number(value.toPrecision(3))));

  const axis = (name, more = {}) => ({
    type: "value", name, nameLocation: "middle", nameGap: 28, nameTextStyle: { color: colour.dim },
    axisLabel: { color: colour.dim, hideOverlap: true }, axisLine: { lineStyle: { color: colour.line } },
    axisTick: { show: false }, splitLine: { lineStyle: { color: colour.line } }, ...more });
  const common = (more = {}) => ({
    animation: false, backgroundColor: "transparent", textStyle: { fontFamily: "system-ui, sans-serif" },
    aria: { enabled: false }, color: colour.some,
    tooltip: { renderMode: "richText", confine: true, backgroundColor: colour.card, borderColor: colour.line,
               textStyle: { color: colour.ink, fontSize: 12 }, ...more.tooltip },
    legend: { top: 0, left: 0, icon: "circle", itemWidth: 9, itemHeight: 9, type: "plain", textStyle: { color: colour.ink },
              inactiveColor: colour.line, ...more.legend },
    grid: { left: 8, right: 16, top: 40, bottom: 6, outerBoundsMode: "same", outerBoundsContain: "all", ...more.grid } });
  const wrap = (line, width = 46) => line.replace(new RegExp(`(.{1,${width}})(\\s|$)`, "g"), "$1\n").trim();

  const draw = {
    dots(chart) {
      const names = chart.series.map((one) => one.name), count = chart.plain ? 1 : names.length;
      const series = chart.series.map((one, place) => ({
        type: "custom", name: one.name, itemStyle: { color: colour[one.role] },
        encode: { x: [0, 1, 2], y: 3 },
        data: one.points.map((p, group) => [p, group]).filter(([p]) => p && p[0] !== null)
          .map(([p, group]) => [p[0], p[1] ?? p[0], p[2] ?? p[0], group]),
        renderItem(_, api) {
          const shift = (place - (count - 1) / 2) * 15 * (chart.plain ? 0 : 1);
          const at = (value) => api.coord([value, api.value(3)]);
          const [x, y] = at(api.value(0)), low = at(api.value(1))[0], high = at(api.value(2))[0];
          const stroke = colour[one.role], row = y + shift;
          const line = (x1, y1, x2, y2) => ({ type: "line", shape: { x1, y1, x2, y2 }, style: { stroke, lineWidth: 2 } });
          return { type: "group", children: [line(low, row, high, row), line(low, row - 4, low, row + 4),
            line(high, row - 4, high, row + 4), { type: "circle", shape: { cx: x, cy: row, r: 5 }, style: { fill: stroke } }] };
        } }));
      return { ...common({
        tooltip: { trigger: "item", formatter: (p) => `${chart.groups[p.value[3]]}, ${p.seriesName}\n${text(p.value[0])}` +
          ` [${text(p.value[1])}, ${text(p.value[2])}]` },
        legend: { show: !chart.plain, data: names }, grid: { top: chart.plain ? 8 : 34 } }),
        xAxis: axis(chart.axis, { min: chart.least ?? undefined }),
        yAxis: { type: "category", data: chart.groups, inverse: true, axisLabel: { color: colour.ink, width: 130, overflow: "break" },
                 axisTick: { show: false }, axisLine: { show: false }, splitLine: { show: true, lineStyle: { color: colour.line } } },
        series, height: chart.groups.length * Math.max(30, count * 15 + 18) + 70 };
    },
    lines(chart) {
      const series = chart.series.map((one) => ({
        type: "line", name: one.name, symbol: chart.x ? "circle" : "none", symbolSize: 7, lineStyle: { width: 1.8 },
        ...(one.role ? { color: colour[one.role] } : {}),
        data: chart.log ? one.points.filter((p) => p[1] > 0) : one.points }));
      if (chart.mark[1] !== null) series.push({ type: "scatter", name: "chosen", symbolSize: 12, z: 5, data: [chart.mark],
                    itemStyle: { color: "transparent", borderColor: colour.ink, borderWidth: 2 } });
      return { ...common({ tooltip: { trigger: "axis", valueFormatter: (v) => (Array.isArray(v) ? text(v[1]) : v === undefined ? "–" : text(Number(v))) },
                           grid: { top: 58, left: chart.y ? 24 : 8 } }),
        xAxis: axis(chart.x ?? "layer", { minInterval: chart.x ? undefined : 1, min: chart.x ? "dataMin" : undefined, max: "dataMax", splitLine: { show: false } }),
        yAxis: axis(chart.y ?? "", { nameGap: 40, type: chart.log ? "log" : "value", min: chart.least === null ? undefined : Math.min(chart.least,
          ...chart.series.flatMap((one) => one.points.map((p) => p[1]))) }), series };
    },
    scatter(chart) {
      return { ...common({ tooltip: { trigger: "item", formatter: (p) => `${p.seriesName}\n${wrap(p.value[2])}` }, grid: { top: 58, left: 30 } }),
        xAxis: axis(chart.x, { scale: true }), yAxis: axis(chart.y, { scale: true, nameGap: 36 }),
        series: chart.series.map((one) => ({ type: "scatter", name: one.name, data: one.points, symbolSize: 8,
          itemStyle: { color: one.hollow ? "transparent" : colour[one.role], opacity: one.hollow ? 1 : 0.75,
                       borderColor: colour[one.role], borderWidth: 1.6 } })) };
    },
    heat(chart) {
      const values = chart.cells.map((cell) => cell[2]).filter((value) => value !== null).sort((a, b) => a - b);
      const low = values[0] ?? 0, high = Math.max(chart.cap ? Math.min(chart.cap, values.at(-1) ?? 0) : values.at(-1) ?? 0, low + 1e-9);
      const good = chart.name === "induce" ? [...colour.ramp].reverse() : colour.ramp;
      const points = (cells, more) => ({ type: "scatter", data: cells, tooltip: { show: false }, silent: true, z: 5, ...more });
      return { ...common({ legend: { show: false }, grid: { top: 8, bottom: 44, left: 24 },
          tooltip: { formatter: (p) => `layer ${chart.layers[p.value[0]]}, position ${chart.positions[p.value[1]]}\n${chart.name} ${text(p.value[2])}` } }),
        xAxis: { ...axis("layer"), type: "category", data: chart.layers, splitLine: { show: false } },
        yAxis: { ...axis("position", { nameGap: 28 }), type: "category", data: chart.positions, splitLine: { show: false } },
        visualMap: { min: low, max: high, seriesIndex: 0, calculable: false, orient: "horizontal", left: "center", bottom: 0, itemWidth: 10, itemHeight: 160,
                     text: [text(high), text(low)], textStyle: { color: colour.dim }, inRange: { color: good } },
        series: [{ type: "heatmap", data: chart.cells, itemStyle: { borderColor: colour.card, borderWidth: 1 }, emphasis: { itemStyle: { borderColor: colour.ink } } },
          points(chart.failing, { symbol: "path://M0 1L1 0L5 4L9 0L10 1L6 5L10 9L9 10L5 6L1 10L0 9L4 5Z", symbolSize: 6, itemStyle: { color: colour.ink, borderColor: colour.card, borderWidth: 0.5, opacity: 0.75 } }),
          points(chart.chosen ? [chart.chosen] : [], { symbolSize: 17, itemStyle: { color: "transparent", borderColor: colour.harmful, borderWidth: 3 } })],
        height: chart.positions.length * 26 + 96 };
    },
    front(chart) {
      const at = (p) => ({ value: [p[0], p[1]], label: p[2] });
      const says = { tooltip: { formatter: (p) => `${p.data.label ?? p.seriesName}\n${chart.x} ${text(p.value[0])}, ${chart.y} ${text(p.value[1])}` } };
      const ends = chart.held.map((p) => [p[0], p[1], ...(p[3].length ? p[3] : [p[0], p[0]]), ...(p[4].length ? p[4] : [p[1], p[1]])]);
      const series = [
        { type: "custom", name: "held-out", silent: true, data: ends, encode: { x: [0, 2, 3], y: [1, 4, 5] }, itemStyle: { color: colour.after },
          renderItem(_, api) {
            const v = (i) => api.value(i), line = (a, b) => ({ type: "line", shape: { x1: a[0], y1: a[1], x2: b[0], y2: b[1] },
              style: { stroke: colour.after, lineWidth: 1.4, opacity: 0.65 } });
            return { type: "group", children: [line(api.coord([v(2), v(1)]), api.coord([v(3), v(1)])), line(api.coord([v(0), v(4)]), api.coord([v(0), v(5)]))] };
          } },
        { type: "scatter", name: "held-out", data: chart.held.map(at), symbolSize: 10, itemStyle: { color: colour.after } },
        { type: "scatter", name: "validation", data: chart.validation.map(at), symbolSize: 10, itemStyle: { color: "transparent", borderColor: colour.before, borderWidth: 2 } },
        { type: "scatter", name: "unedited", data: chart.base ? [at(chart.base)] : [], symbol: "diamond", symbolSize: 13, itemStyle: { color: colour.before } },
        { type: "scatter", name: "chosen", data: chart.chosen ? [at(chart.chosen)] : [], symbolSize: 19, silent: true,
          itemStyle: { color: "transparent", borderColor: colour.harmful, borderWidth: 2.5 } }];
      return { ...common({ ...says, grid: { left: 24 } }), xAxis: axis(chart.x), yAxis: axis(chart.y, { nameGap: 40 }), series };
    },
    rests(chart) {
      const grids = [{ left: 30, right: 16, top: 34, height: 130 }, { left: 30, right: 16, top: 200, height: 140 }];
      const series = chart.series.flatMap((one, place) => [0, 1].map((grid) => ({
        type: "line", name: one.name, xAxisIndex: grid, yAxisIndex: grid, symbol: "circle", symbolSize: 7, color: colour.some[place % 8],
        lineStyle: { width: 1, opacity: 0.5 }, data: one.points.map((p) => ({ value: [p[0], p[1 + grid]], label: p[3] })) })));
      const frame = common({ tooltip: { trigger: "item", formatter: (p) => `${wrap(p.data.label)}\n${text(p.value[1])} %` } });
      return { ...frame, grid: grids.map((grid) => ({ ...grid, outerBoundsMode: "same", outerBoundsContain: "axisLabel" })),
        xAxis: [0, 1].map((grid) => axis(grid ? (chart.embedding ? "layer (−1: embedding)" : "layer") : "", { gridIndex: grid, minInterval: 1, max: "dataMax", min: chart.embedding ? -1 : undefined })),
        yAxis: [axis("left, %", { gridIndex: 0, nameGap: 40 }), axis("change, %", { gridIndex: 1, nameGap: 40 })], series };
    },
  };

  document.documentElement.classList.add("js");
  const drawn = [...document.querySelectorAll("[data-chart]")].map((place) => echarts.init(place, null, { renderer: "svg" }));
  function draw_all(theme) {
    colour = COLOURS[theme];
    for (const chart of drawn) {
      const place = chart.getDom(), data = charts[place.dataset.chart], { height, ...option } = draw[data.kind](data);
      if (height) place.style.height = `${height}px`;
      chart.resize();
      chart.setOption(option, true);
    }
  }
  const now = () => (dark.matches ? "dark" : "light");
  for (const details of document.querySelectorAll("details:not(.unfolded)")) details.open = false;
  draw_all(now());
  dark.addEventListener("change", () => draw_all(now()));
  new ResizeObserver(() => drawn.forEach((chart) => chart.resize())).observe(document.querySelector("main"));
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    for (const details of closed) details.open = true;
    draw_all("light");
  });
  addEventListener("afterprint", () => {
    for (const details of closed) details.open = false;
    draw_all(now());
  });
})();
