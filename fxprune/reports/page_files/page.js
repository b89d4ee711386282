"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const SVG = "http://www.w3.org/2000/svg";
  const byId = (id) => document.getElementById(id);

  // Texts come from the user's model: they are only ever set as text, never as markup.
  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };
  const draw = (tag, attributes, text) => {
    const element = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const breakable = (name) => name.split(/(?<=[._])/).flatMap((part, i) => (i ? [make("wbr"), part] : [part]));
  const colour = (family) => `--hue:${family.hue};--shift:${family.shift}%`;
  const dot = (number) => {
    const family = data.families[number];
    return make("i", { class: family.frozen ? "dot held" : "dot", style: colour(family) });
  };
  const bar = (share) => {
    const fill = make("span");
    fill.style.inlineSize = `${Math.min(share ?? 100, 100)}%`;
    return make("span", { class: "bar", "aria-hidden": "true" }, fill);
  };
  const chip = (number, text) => {
    const name = data.families[number].name;
    const label = `Show family ${name} in the coupling graph`;
    return make("button", { type: "button", class: "chip", "data-family": number, "aria-label": label }, dot(number), text ?? name);
  };

  // -- light and dark ------------------------------------------------------------------------------------------------
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;
  const stored = (value) => {
    try {
      if (value === undefined) return localStorage.getItem("fxprune-theme");
      localStorage.setItem("fxprune-theme", value);
    } catch { /* a page in a frame may have no storage */ }
    return null;
  };
  if (["light", "dark"].includes(stored())) root.dataset.theme = stored();
  byId("theme").addEventListener("click", () => {
    const now = root.dataset.theme ?? (dark.matches ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
    stored(root.dataset.theme);
  });

  // -- ratios ----------------------------------------------------------------------------------------------------------
  // A chart is drawn as wide as it is shown, so that its labels keep their size on a phone.
  const sized = (chart, width, height) => {
    const shown = Math.min(width, Math.max(280, chart.clientWidth || width));
    chart.setAttribute("viewBox", `0 0 ${shown} ${Math.round((height * (1 + shown / width)) / 2)}`);
    return { width: shown, height: Math.round((height * (1 + shown / width)) / 2) };
  };
  const AT = { left: 44, right: 14, top: 12, bottom: 34 };
  const spot = (x, y) => [
    AT.left + x * (AT.width - AT.left - AT.right),
    AT.top + (1 - y) * (AT.height - AT.top - AT.bottom),
  ];

  const ratios = () => {
    const slider = byId("ratio");
    if (!slider) return;
    const chart = byId("ratio-chart");
    Object.assign(AT, sized(chart, 460, 300));
    const highest = Math.max(100, ...data.ratios.flatMap((r) => r.figures.map((f) => f.left ?? 0))) / 100;
    const shown = data.ratios[0].figures.map((f, i) => [f.name, i]).filter(([name]) => name !== "Memory");
    for (let share = 0; share <= 100 * highest; share += 25) {
      const [x, y] = spot(0, share / 100 / highest);
      chart.append(draw("line", { class: "grid", x1: x, x2: AT.width - AT.right, y1: y, y2: y }));
      chart.append(draw("text", { x: x - 8, y: y + 4, "text-anchor": "end" }, `${share} %`));
    }
    for (let ratio = 0; ratio <= 1; ratio += 0.25) {
      const [x, y] = spot(ratio, 0);
      chart.append(draw("text", { x, y: y + 20, "text-anchor": "middle" }, String(ratio)));
    }
    const mark = chart.appendChild(draw("line", { class: "mark" }));
    const circles = shown.map(([name, i], order) => {
      const points = data.ratios.map((r) => spot(Number(r.ratio), (r.figures[i].left ?? 100) / 100 / highest).join(","));
      chart.append(draw("polyline", { class: `line s${order}`, points: [spot(0, 1 / highest).join(","), ...points].join(" ") }));
      const sample = draw("svg", { viewBox: "0 0 28 10", "aria-hidden": "true" });
      sample.append(draw("line", { class: `line s${order}`, x1: 0, x2: 28, y1: 5, y2: 5 }));
      byId("ratio-legend").append(make("span", {}, sample, name));
      return draw("circle", { class: `s${order}`, r: 5 });
    });
    chart.append(...circles);

    const show = () => {
      const found = data.ratios[slider.value];
      byId("ratio-value").textContent = found.ratio;
      slider.setAttribute("aria-valuetext", `ratio ${found.ratio}`);
      byId("ratio-figures").replaceChildren(
        ...found.figures.map((f) => {
          const value = make("span", { class: "big" }, f.after);
          if (f.exact !== null) value.dataset.value = f.exact;
          const of = make("span", { class: "of" }, `of ${f.before}${f.left === null ? "" : ` · ${f.left} %`}`);
          return make("li", { "data-figure": f.name }, make("span", { class: "key" }, f.name), value, bar(f.left), of);
        }),
      );
      byId("ratio-call").textContent = found.call;
      byId("ratio-refused").hidden = !found.refused;
      byId("ratio-refused").textContent = found.refused && `prune raises here: ${found.refused}`;
      const kept = data.families.map((family, i) => [family, i]).filter(([family]) => !family.frozen && family.units > 1);
      byId("ratio-families").replaceChildren(
        ...kept.map(([family, i]) => {
          const units = `${found.kept[i].toLocaleString("en")} of ${family.units.toLocaleString("en")}`;
          return make("li", {}, dot(i), make("span", {}, ...breakable(family.name)), make("span", {}, units), bar((100 * found.kept[i]) / family.units));
        }),
      );
      const [x, bottom] = spot(Number(found.ratio), 0);
      for (const [name, value] of Object.entries({ x1: x, x2: x, y1: AT.top, y2: bottom })) mark.setAttribute(name, value);
      shown.forEach(([, i], order) => {
        const [cx, cy] = spot(Number(found.ratio), (found.figures[i].left ?? 100) / 100 / highest);
        circles[order].setAttribute("cx", cx);
        circles[order].setAttribute("cy", cy);
      });
    };
    slider.addEventListener("input", show);
    show();
  };

  // -- modules ---------------------------------------------------------------------------------------------------------
  const modules = () => {
    const details = [...document.querySelectorAll(".tree details")];
    byId("open-all").addEventListener("click", () => details.forEach((d) => (d.open = true)));
    byId("close-all").addEventListener("click", () => details.forEach((d, i) => (d.open = i === 0)));
    byId("filter").addEventListener("input", (event) => {
      const wanted = event.target.value.trim().toLowerCase();
      const visit = (item) => {
        const inside = [...item.querySelectorAll(":scope > details > ul:not(.tensors) > li")].map(visit).some(Boolean);
        const here = item.dataset.name.includes(wanted);
        item.hidden = Boolean(wanted) && !here && !inside;
        if (wanted && inside) item.querySelector("details").open = true;
        return here || inside;
      };
      document.querySelectorAll(".tree > li").forEach(visit);
    });
  };

  // -- coupling --------------------------------------------------------------------------------------------------------
  const order = Object.fromEntries(Object.keys(data.places).map((name, i) => [name, i]));
  const split = (place) => {
    const at = place.lastIndexOf(":");
    return [place.slice(0, at), place.slice(at + 1)];
  };
  const ROW = 32;
  const because = (op, module) => (op === "shared" ? "one unit" : module ? `${op} in ${module}` : op);

  const walk = () => {
    const list = byId("members");
    const arcs = byId("arcs");
    let family = 0;
    let chosen = null;

    const tiesOf = (place, number) =>
      data.links.filter(([a, b, f]) => f === number && (a === place || b === place)).map(([a, b, , op, module]) => [a === place ? b : a, op, module]);

    const familiesOf = (layer) =>
      data.families.flatMap((found, number) => found.places.filter((p) => split(p)[0] === layer).map((p) => [p, number]));

    const drawArcs = () => {
      const rows = new Map([...list.children].map((row, i) => [row.dataset.place, i]));
      const width = parseFloat(getComputedStyle(arcs).inlineSize) || 110;
      const height = rows.size * ROW;
      arcs.setAttribute("viewBox", `0 0 ${width} ${height}`);
      arcs.style.blockSize = `${height}px`;
      arcs.style.setProperty("--arc", data.families[family].frozen ? "var(--soft)" : `hsl(${data.families[family].hue} var(--family-strong) calc(var(--family-light) + ${data.families[family].shift}%))`);
      arcs.classList.toggle("chosen", chosen !== null);
      const longest = Math.max(1, ...data.links.filter((l) => l[2] === family).map(([a, b]) => Math.abs(rows.get(a) - rows.get(b))));
      const lines = data.links
        .filter((link) => link[2] === family && rows.has(link[0]) && rows.has(link[1]))
        .map(([a, b]) => {
          const [y1, y2] = [rows.get(a), rows.get(b)].map((i) => i * ROW + ROW / 2);
          const reach = width - 12 - (width - 24) * Math.sqrt(Math.abs(rows.get(a) - rows.get(b)) / longest);
          const path = draw("path", { d: `M${width - 8} ${y1}C${reach} ${y1} ${reach} ${y2} ${width - 8} ${y2}` });
          path.classList.toggle("on", a === chosen || b === chosen);
          return path;
        });
      const dots = [...rows.values()].map((i) => draw("circle", { cx: width - 8, cy: i * ROW + ROW / 2, r: 4 }));
      arcs.replaceChildren(...lines, ...dots);
    };

    const describe = () => {
      const panel = byId("panel");
      const found = data.families[family];
      if (chosen === null) {
        const kept = `${found.kept.toLocaleString("en")} of ${found.units.toLocaleString("en")} units stay, ${found.left} parameters are left with it.`;
        const parts = [make("h3", {}, dot(family), found.name), make("p", {}, kept)];
        if (found.reason) parts.push(make("p", { class: "why" }, `It ${found.reason}.`));
        parts.push(make("p", { class: "note" }, "Choose a layer to see what it is tied to."));
        panel.replaceChildren(...parts);
        return;
      }
      const [layer] = split(chosen);
      const parts = [make("h3", {}, layer), make("code", {}, data.places[layer] || "a tensor of its own")];
      for (const [place, number] of familiesOf(layer)) {
        const ties = tiesOf(place, number).map(([other, op, module]) => {
          const button = make("button", { type: "button", class: "chip", "data-place": other, "data-of": number }, other);
          return make("li", {}, button, make("span", {}, op === "shared" ? "one unit holds channels of both" : `by ${because(op, module)}`));
        });
        const title = make("p", {}, `Dimension ${split(place)[1]}: `, chip(number));
        const none = ties.length ? [] : [make("li", {}, "tied to nothing else")];
        parts.push(make("div", { class: "side" }, title, make("ul", { class: "ties" }, ...ties, ...none)));
      }
      panel.replaceChildren(...parts);
    };

    const mark = () => {
      const ties = chosen === null ? new Map() : new Map(tiesOf(chosen, family).map(([other, op, module]) => [other, because(op, module)]));
      const focusable = [...list.children].find((row) => row.dataset.place === chosen) ?? list.firstElementChild;
      for (const row of list.children) {
        row.setAttribute("aria-selected", String(row.dataset.place === chosen));
        row.tabIndex = row === focusable ? 0 : -1;
        row.querySelector(".by")?.remove();
        const how = ties.get(row.dataset.place);
        if (how) row.append(make("span", { class: "by", title: how }, how.split(" in ")[0]));
      }
      drawArcs();
      describe();
    };

    const choose = (place, { focus = false } = {}) => {
      chosen = place;
      mark();
      const row = [...list.children].find((r) => r.dataset.place === place);
      if (!row) return;
      const box = list.parentElement;
      if (row.offsetTop < box.scrollTop || row.offsetTop + ROW > box.scrollTop + box.clientHeight) box.scrollTop = row.offsetTop - box.clientHeight / 2;
      if (focus) row.focus({ preventScroll: true });
    };

    const open = (number, place = null) => {
      family = number;
      byId("walk-family").value = String(number);
      const found = [...data.families[number].places].sort((a, b) => order[split(a)[0]] - order[split(b)[0]] || a.localeCompare(b));
      list.replaceChildren(
        ...found.map((name) => {
          const [layer, dim] = split(name);
          const label = make("span", { class: "name" }, make("bdi", {}, ...breakable(layer)));
          return make("li", { role: "option", "data-place": name, title: name }, label, make("span", { class: "dim" }, `dim ${dim}`));
        }),
      );
      list.parentElement.scrollTop = 0;
      choose(place);
    };

    list.addEventListener("click", (event) => {
      const row = event.target.closest("li");
      if (row) choose(row.dataset.place === chosen ? null : row.dataset.place, { focus: true });
    });
    list.addEventListener("keydown", (event) => {
      const row = event.target.closest("li");
      const next = { ArrowDown: row.nextElementSibling, ArrowUp: row.previousElementSibling, Home: list.firstElementChild, End: list.lastElementChild };
      if (event.key === "Enter" || event.key === " ") choose(row.dataset.place, { focus: true });
      else if (event.key in next) next[event.key]?.focus();
      else return;
      event.preventDefault();
    });
    byId("walk-family").addEventListener("change", (event) => open(Number(event.target.value)));
    byId("walk-layer").addEventListener("change", (event) => {
      const [found] = familiesOf(event.target.value.trim());
      if (found) open(found[1], found[0]);
    });
    document.addEventListener("click", (event) => {
      const button = event.target.closest("button[data-place], button[data-family]");
      if (!button) return;
      if (button.dataset.place) {
        open(Number(button.dataset.of), button.dataset.place);
        return;
      }
      open(Number(button.dataset.family));
      byId("coupling").scrollIntoView();
      list.firstElementChild?.focus({ preventScroll: true });
    });
    addEventListener("resize", drawArcs);
    if (data.families.length) open(0);
  };

  // -- sensitivity -----------------------------------------------------------------------------------------------------
  const sensitivity = () => {
    if (!data.curves) return;
    const chart = byId("curve-chart");
    const box = { left: 56, right: 16, top: 14, bottom: 40, ...sized(chart, 640, 380) };
    const values = data.curves.lines.flatMap((line) => line.values).filter((v) => v !== null);
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const span = high - low || 1;
    const furthest = data.curves.ratios.at(-1);
    const x = (ratio) => box.left + (ratio / furthest) * (box.width - box.left - box.right);
    const y = (value) => box.top + ((high - value) / span) * (box.height - box.top - box.bottom);
    for (let k = 0; k <= 4; k += 1) {
      const value = low + (span * k) / 4;
      chart.append(draw("line", { class: "grid", x1: box.left, x2: box.width - box.right, y1: y(value), y2: y(value) }));
      chart.append(draw("text", { x: box.left - 8, y: y(value) + 4, "text-anchor": "end" }, value.toPrecision(3)));
    }
    for (const ratio of data.curves.ratios) {
      chart.append(draw("text", { x: x(ratio), y: box.height - 16, "text-anchor": "middle" }, String(ratio)));
    }
    const paths = data.curves.lines.map((line) => {
      const points = line.values.map((v, i) => [v, i]).filter(([v]) => v !== null);
      const d = points.map(([v, i], k) => `${k ? "L" : "M"}${x(data.curves.ratios[i]).toFixed(1)} ${y(v).toFixed(1)}`).join("");
      const path = draw("path", { d, style: line.family === null ? "--hue:210" : colour(data.families[line.family]) });
      path.append(draw("title", {}, line.name));
      return path;
    });
    chart.append(...paths);
    const change = (line) => Math.abs((line.values.at(-1) ?? Infinity) - line.values[0]);
    const ranked = data.curves.lines.map((line, i) => [line, i]).sort(([a], [b]) => change(b) - change(a));
    byId("curve-list").append(
      ...ranked.map(([line, i]) => {
        const button = make("button", { type: "button", "aria-pressed": "false" });
        if (line.family !== null) button.append(dot(line.family));
        button.append(make("span", {}, ...breakable(line.name)), make("span", { class: "value" }, line.texts.at(-1)));
        button.addEventListener("click", () => {
          const on = button.getAttribute("aria-pressed") !== "true";
          button.setAttribute("aria-pressed", String(on));
          paths[i].classList.toggle("on", on);
          chart.classList.toggle("chosen", paths.some((p) => p.classList.contains("on")));
        });
        return make("li", {}, button);
      }),
    );
  };

  ratios();
  modules();
  walk();
  sensitivity();
})();
