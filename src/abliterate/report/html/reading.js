"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = (name) => document.getElementById(name);
  const slider = find("layer"), readout = find("readout"), places = [...document.querySelectorAll(".tokens")];
  const tokens = places.map((place) => [...place.querySelectorAll(".t")]);
  let shown = data.shown;

  const shade = (value, scale) => {
    const step = Math.round(10 * Math.max(-1, Math.min(1, value / scale)));
    return (step < 0 ? "n" : "p") + Math.abs(step);
  };
  function show(place) {
    shown = place;
    const scale = data.scales[place];
    tokens.forEach((spans, text) => spans.forEach((span, number) => {
      const value = data.texts[text][place][number];
      span.className = `t ${shade(value, scale)}${span.classList.contains("reply") ? " reply" : ""}`;
      span.title = value.toFixed(3);
    }));
    find("number").textContent = data.layers[place];
    find("said").textContent = data.said[place];
    find("low").textContent = (-scale).toFixed(2);
    find("high").textContent = scale.toFixed(2);
  }
  const at = (event) => {
    const span = event.target.closest(".t");
    if (!span) return;
    const text = Number(span.parentElement.dataset.text), number = tokens[text].indexOf(span);
    const values = data.texts[text].map((layer) => layer[number]);
    const most = values.reduce((best, value, place) => (Math.abs(value) > Math.abs(values[best]) ? place : best), 0);
    readout.textContent = `Token ${number + 1} ${JSON.stringify(span.textContent)}: ${values[shown].toFixed(3)} at layer ` +
      `${data.layers[shown]}; farthest from 0 at layer ${data.layers[most]}: ${values[most].toFixed(3)}`;
  };

  document.documentElement.classList.add("js");
  slider.value = data.shown;
  slider.addEventListener("input", () => show(Number(slider.value)));
  document.querySelector("main").addEventListener("pointerover", at);
  document.querySelector("main").addEventListener("click", at);
  document.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
})();
