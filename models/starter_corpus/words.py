"""Hand-written word tables: opposites, translations, categories, names."""

from starter_corpus.world import DAYS, MONTHS, PLANETS, _pairs

OPPOSITES = _pairs(
    """
hot:cold
big:small
fast:slow
up:down
left:right
day:night
happy:sad
open:closed
old:young
tall:short
wet:dry
hard:soft
light:dark
full:empty
early:late
loud:quiet
clean:dirty
rich:poor
strong:weak
thick:thin
near:far
high:low
good:bad
easy:difficult
first:last
inside:outside
true:false
begin:end
push:pull
buy:sell
give:take
win:lose
love:hate
laugh:cry
sweet:bitter
sharp:blunt
smooth:rough
wide:narrow
deep:shallow
heavy:light
awake:asleep
safe:dangerous
cheap:expensive
polite:rude
brave:afraid
always:never
before:after
above:below
more:less
same:different
"""
)

PAST_TENSES = _pairs(
    """
go:went
eat:ate
see:saw
run:ran
write:wrote
sing:sang
swim:swam
drink:drank
give:gave
take:took
make:made
come:came
sleep:slept
buy:bought
think:thought
fly:flew
drive:drove
speak:spoke
break:broke
find:found
build:built
teach:taught
catch:caught
draw:drew
win:won
read:read
jump:jumped
walk:walked
play:played
cook:cooked
talk:talked
help:helped
look:looked
dance:danced
paint:painted
open:opened
"""
)

PLURALS = _pairs(
    """
cat:cats
dog:dogs
child:children
man:men
woman:women
foot:feet
tooth:teeth
mouse:mice
goose:geese
fish:fish
sheep:sheep
box:boxes
bus:buses
baby:babies
city:cities
leaf:leaves
knife:knives
wolf:wolves
book:books
tree:trees
apple:apples
glass:glasses
potato:potatoes
person:people
story:stories
berry:berries
dish:dishes
watch:watches
car:cars
house:houses
star:stars
flower:flowers
"""
)

SYNONYMS = _pairs(
    """
happy:glad
sad:unhappy
big:large
small:little
fast:quick
smart:clever
pretty:beautiful
start:begin
end:finish
hard:difficult
scared:afraid
angry:mad
tired:sleepy
loud:noisy
quiet:silent
kind:nice
funny:amusing
strange:odd
cold:chilly
rich:wealthy
brave:courageous
shout:yell
jump:leap
look:watch
gift:present
road:street
home:house
stone:rock
ill:sick
correct:right
"""
)

RHYMES = _pairs(
    """
cat:hat, bat, mat
dog:fog, log, frog
sun:fun, run, bun
tree:bee, see, free
star:car, far, jar
moon:spoon, soon, June
house:mouse, blouse
day:play, may, way
night:light, right, bright
rain:train, plain, brain
boat:coat, goat, float
fish:dish, wish
king:ring, sing, wing
cake:lake, snake, make
blue:shoe, true, new
bed:red, head, bread
ball:tall, wall, fall
snow:go, slow, grow
bear:chair, hair, pear
book:cook, look, hook
"""
)

FRENCH = _pairs(
    """
hello:bonjour
goodbye:au revoir
thank you:merci
please:s'il vous plaît
yes:oui
no:non
cat:chat
dog:chien
house:maison
water:eau
bread:pain
milk:lait
cheese:fromage
apple:pomme
book:livre
red:rouge
blue:bleu
green:vert
white:blanc
black:noir
one:un
two:deux
three:trois
friend:ami
sun:soleil
moon:lune
school:école
night:nuit
day:jour
love:amour
"""
)

SPANISH = _pairs(
    """
hello:hola
goodbye:adiós
thank you:gracias
please:por favor
yes:sí
no:no
cat:gato
dog:perro
house:casa
water:agua
bread:pan
milk:leche
cheese:queso
apple:manzana
book:libro
red:rojo
blue:azul
green:verde
white:blanco
black:negro
one:uno
two:dos
three:tres
friend:amigo
sun:sol
moon:luna
school:escuela
night:noche
day:día
love:amor
"""
)

GERMAN = _pairs(
    """
hello:hallo
goodbye:auf Wiedersehen
thank you:danke
please:bitte
yes:ja
no:nein
cat:Katze
dog:Hund
house:Haus
water:Wasser
bread:Brot
milk:Milch
cheese:Käse
apple:Apfel
book:Buch
red:rot
blue:blau
green:grün
white:weiß
black:schwarz
one:eins
two:zwei
three:drei
friend:Freund
sun:Sonne
moon:Mond
school:Schule
night:Nacht
day:Tag
love:Liebe
"""
)

CATEGORIES = {
    "fruits": [
        "apple",
        "banana",
        "orange",
        "pear",
        "cherry",
        "grape",
        "lemon",
        "mango",
        "peach",
        "plum",
        "kiwi",
        "melon",
    ],
    "vegetables": [
        "carrot",
        "potato",
        "onion",
        "tomato",
        "cabbage",
        "pea",
        "bean",
        "cucumber",
        "spinach",
        "pepper",
        "leek",
        "pumpkin",
    ],
    "animals": [
        "cat",
        "dog",
        "horse",
        "lion",
        "tiger",
        "rabbit",
        "bear",
        "fox",
        "wolf",
        "elephant",
        "cow",
        "sheep",
    ],
    "birds": [
        "owl",
        "eagle",
        "parrot",
        "duck",
        "goose",
        "penguin",
        "robin",
        "swan",
        "crow",
        "sparrow",
    ],
    "colours": [
        "red",
        "blue",
        "green",
        "yellow",
        "orange",
        "purple",
        "pink",
        "brown",
        "black",
        "white",
    ],
    "drinks": ["water", "tea", "coffee", "milk", "juice", "lemonade", "cocoa"],
    "vehicles": [
        "car",
        "bus",
        "train",
        "bicycle",
        "plane",
        "ship",
        "truck",
        "boat",
        "tram",
        "scooter",
    ],
    "sports": [
        "football",
        "tennis",
        "swimming",
        "running",
        "basketball",
        "cycling",
        "skiing",
        "golf",
        "hockey",
    ],
    "instruments": ["piano", "guitar", "violin", "drum", "flute", "trumpet", "harp", "cello"],
    "shapes": ["circle", "square", "triangle", "rectangle", "hexagon", "oval", "star"],
    "flowers": ["rose", "tulip", "daisy", "lily", "sunflower", "violet", "orchid"],
    "trees": ["oak", "pine", "maple", "birch", "willow", "palm", "elm", "fir"],
    "clothes": ["shirt", "hat", "coat", "sock", "shoe", "dress", "scarf", "glove", "jacket"],
    "planets": PLANETS,
    "days of the week": DAYS,
    "months": MONTHS,
    "rooms": ["kitchen", "bedroom", "bathroom", "living room", "hall", "garage"],
    "tools": ["hammer", "saw", "drill", "screwdriver", "spanner", "axe", "ladder"],
    "jobs": [
        "teacher",
        "doctor",
        "nurse",
        "baker",
        "farmer",
        "pilot",
        "chef",
        "builder",
        "painter",
    ],
    "countries": [
        "France",
        "Germany",
        "Italy",
        "Spain",
        "Japan",
        "China",
        "India",
        "Egypt",
        "Kenya",
        "Canada",
        "Mexico",
        "Brazil",
        "Peru",
    ],
    "cities": [
        "London",
        "Paris",
        "Rome",
        "Berlin",
        "Madrid",
        "Tokyo",
        "Cairo",
        "Oslo",
        "Athens",
        "Lisbon",
        "Vienna",
    ],
    "metals": ["iron", "gold", "silver", "copper", "tin", "lead"],
    "weather words": ["sunny", "rainy", "windy", "cloudy", "snowy", "stormy", "foggy"],
    "feelings": ["happy", "sad", "angry", "tired", "proud", "excited", "nervous", "calm"],
    "school subjects": ["maths", "history", "science", "music", "art", "geography", "English"],
    "body parts": ["head", "arm", "leg", "hand", "foot", "eye", "ear", "nose", "mouth", "knee"],
    "toys": ["ball", "doll", "kite", "puzzle", "robot", "teddy", "train", "blocks"],
    "breakfast foods": ["toast", "eggs", "porridge", "cereal", "pancakes", "yoghurt", "fruit"],
    "desserts": ["cake", "ice cream", "pie", "pudding", "cookies", "brownies"],
    "programming languages": ["Python", "Java", "Rust", "Swift", "Go", "Ruby"],
}
ONE_OF = {
    "fruits": "a fruit",
    "vegetables": "a vegetable",
    "animals": "an animal",
    "birds": "a bird",
    "colours": "a colour",
    "drinks": "a drink",
    "vehicles": "a vehicle",
    "sports": "a sport",
    "instruments": "an instrument",
    "shapes": "a shape",
    "flowers": "a flower",
    "trees": "a tree",
    "clothes": "a piece of clothing",
    "planets": "a planet",
    "months": "a month",
    "rooms": "a room",
    "tools": "a tool",
    "jobs": "a job",
    "countries": "a country",
    "cities": "a city",
    "metals": "a metal",
    "toys": "a toy",
    "feelings": "a feeling",
    "desserts": "a dessert",
    "days of the week": "a day of the week",
    "programming languages": "a programming language",
}

NAMES = [
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Finn",
    "Grace",
    "Hugo",
    "Iris",
    "Jack",
    "Kate",
    "Leo",
    "Mia",
    "Noah",
    "Olivia",
    "Paul",
    "Quinn",
    "Rosa",
    "Sam",
    "Tom",
    "Uma",
    "Victor",
    "Wendy",
    "Zoe",
    "Alice",
    "Bob",
    "Carol",
    "Dan",
    "Eva",
    "Felix",
    "Gina",
    "Henry",
    "Ivy",
    "Jonas",
    "Lily",
    "Max",
    "Nina",
    "Oscar",
    "Ruby",
    "Theo",
]
HOBBIES = [
    "reading",
    "painting",
    "dancing",
    "cooking",
    "swimming",
    "singing",
    "running",
    "gardening",
    "fishing",
    "hiking",
    "chess",
    "football",
    "drawing",
    "skating",
]
FOODS = [
    "pizza",
    "soup",
    "bread",
    "pasta",
    "rice",
    "salad",
    "cake",
    "pancakes",
    "cheese",
    "curry",
    "sushi",
    "apples",
    "chocolate",
]
