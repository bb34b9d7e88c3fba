// Print the probabilities that the package nsfwjs itself gives the pictures of images.py, as JSON.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
const require = createRequire(process.cwd() + "/");
const tf = require("@tensorflow/tfjs");
const { load } = require("nsfwjs/core");
const { MobileNetV2Model } = require("nsfwjs/models/mobilenet_v2");

console.info = () => {};
console.warn = () => {};
const folder = process.argv[2];
await tf.setBackend("cpu");
const model = await load("MobileNetV2", { modelDefinitions: [MobileNetV2Model] });
const shapes = JSON.parse(readFileSync(`${folder}/shapes.json`));
const expected = {};
for (const [number, [name, shape]] of Object.entries(shapes).entries()) {
  const image = tf.tensor3d(new Uint8Array(readFileSync(`${folder}/${number}.raw`)), shape, "int32");
  const classes = await model.classify(image);
  classes.sort((one, other) => one.className.localeCompare(other.className));
  expected[name] = Object.fromEntries(classes.map((one) => [one.className, one.probability]));
}
process.stdout.write(JSON.stringify(expected, null, 1) + "\n");
