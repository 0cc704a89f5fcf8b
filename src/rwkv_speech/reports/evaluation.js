"use strict";
// The utterances, worst first, are columns of a compressed JSON object in the page; only what is looked at is drawn.
(async () => {
  const STEP = 50, LONGEST = 400, MARKS = /[\u0001-\u0003]/g;
  const KIND = { "\u0001": "sub", "\u0002": "ins", "\u0003": "del" };
  const NAMES = ["duration", "direction", "language", "speaker", "task", "turn"];
  const get = (id) => document.getElementById(id);
  const packed = Uint8Array.from(atob(get("data").textContent), (x) => x.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const data = await new Response(stream).json();
  const size = data.id.length, all = Int32Array.from({ length: size }, (_, i) => i);
  const groups = NAMES.filter((name) => data[name]);
  let texts = null, shown = [], drawn = 0;

  const make = (tag, name, text) => {
    const element = document.createElement(tag);
    element.className = name;
    if (text !== undefined) element.textContent = text;
    return element;
  };

  const player = (i) => {
    const button = make("button", "play", "▶ listen");
    button.type = "button";
    button.addEventListener("click", () => {
      const audio = make("audio", "play");
      audio.controls = audio.autoplay = true;
      const end = data.offset[i] + data.seconds[i];
      audio.src = data.audio[i] + (data.offset[i] ? `#t=${data.offset[i]},${end}` : "");
      audio.addEventListener("error", () => audio.replaceWith(make("span", "soft", "cannot be played")));
      button.replaceWith(audio);
    });
    return button;
  };

  const word = (token) => {
    const kind = KIND[token[0]] || "equal", parts = kind === "equal" ? [token, token] : token.slice(1).split("\u0001");
    const [ref, hyp] = kind === "ins" ? ["·", parts[0]] : kind === "del" ? [parts[0], "·"] : parts;
    const box = make("span", "w " + kind);
    box.append(make("span", "ref", ref), make("span", "hyp", hyp));
    return box;
  };

  const utterance = (i) => {
    const box = make("div", "utterance"), head = make("span", "soft"), words = make("div", "words");
    const facts = [data.verdict[i], `${data.seconds[i].toFixed(1)} s`];
    for (const name of groups)
      if (name !== "duration" && data[name].of[i] >= 0) facts.push(data[name].names[data[name].of[i]]);
    head.append(make("bdi", "", data.id[i]), " · " + facts.join(", ") + " ");
    words.dir = "auto";
    const tokens = data.words[i] ? data.words[i].split(" ") : [];
    words.append(...tokens.slice(0, LONGEST).map(word));
    box.append(head);
    if (data.audio[i]) box.append(player(i));
    box.append(words);
    if (tokens.length > LONGEST) box.append(make("span", "soft", `and ${tokens.length - LONGEST} more`));
    if (data.ctc && data.ctc[i]) box.append(make("div", "soft", "CTC head alone: " + data.ctc[i]));
    return box;
  };

  const draw = () => {
    const next = shown.slice(drawn, drawn + STEP);
    get("list").append(...next.map(utterance));
    drawn += next.length;
    get("more").hidden = drawn >= shown.length;
    get("count").textContent = `${shown.length.toLocaleString("en")} of ${size.toLocaleString("en")} utterances`;
  };

  const update = () => {
    const terms = get("search").value.toLowerCase().split(/\s+/).filter(Boolean), kind = get("kind").value;
    if (terms.length && !texts) texts = data.words.map((x, i) => `${data.id[i]} ${x.replace(MARKS, " ")}`.toLowerCase());
    const tests = [];
    for (const term of terms) tests.push((i) => texts[i].includes(term));
    if (kind === "wrong" || kind === "right") tests.push((i) => data.wrong[i] === (kind === "wrong"));
    else if (kind) {
      const mark = Object.keys(KIND).find((x) => KIND[x] === kind);
      tests.push((i) => data.words[i].startsWith(mark) || data.words[i].includes(" " + mark));
    }
    for (const name of groups)
      if (get(name).value) tests.push((i) => data[name].of[i] === Number(get(name).value));
    shown = Array.from(all.filter((i) => tests.every((test) => test(i))));
    const key = data[get("order").value], sign = get("order").value === "index" ? 1 : -1;
    if (key) shown.sort((a, b) => sign * (key[a] - key[b]) || a - b);
    get("list").replaceChildren();
    drawn = 0;
    draw();
  };

  for (const name of NAMES) {
    if (groups.includes(name))
      get(name).append(new Option("all", ""), ...data[name].names.map((text, number) => new Option(text, number)));
    else get(name).parentElement.remove();
  }
  let waiting;
  get("filters").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(update, 150); });
  get("filters").addEventListener("submit", (event) => event.preventDefault());
  get("more").addEventListener("click", draw);
  get("filters").hidden = false;
  update();
})();
