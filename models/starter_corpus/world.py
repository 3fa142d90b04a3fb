"""Hand-written facts about the world that the corpus asks about."""

from typing import NamedTuple


def _pairs(table: str) -> dict[str, str]:
    """Reads lines of `name:value`."""
    return dict(line.split(":") for line in table.strip().splitlines())


class Animal(NamedTuple):
    kind: str
    sound: str
    legs: int
    home: str
    food: str
    baby: str
    colour: str
    trait: str
    size: str


def _animals(table: str) -> dict[str, Animal]:
    """Reads lines of `name|kind|sound|legs|home|food|baby|colour|trait|size`."""
    animals = {}
    for line in table.strip().splitlines():
        name, kind, sound, legs, *rest = line.split("|")
        animals[name] = Animal(kind, sound, int(legs), *rest)
    return animals


CAPITALS = _pairs(
    """
France:Paris
Germany:Berlin
Italy:Rome
Spain:Madrid
Portugal:Lisbon
England:London
Scotland:Edinburgh
Wales:Cardiff
Ireland:Dublin
Norway:Oslo
Sweden:Stockholm
Finland:Helsinki
Denmark:Copenhagen
Iceland:Reykjavik
Poland:Warsaw
Austria:Vienna
Hungary:Budapest
Greece:Athens
Turkey:Ankara
Russia:Moscow
Ukraine:Kyiv
Belgium:Brussels
Switzerland:Bern
Romania:Bucharest
Bulgaria:Sofia
Croatia:Zagreb
Serbia:Belgrade
Japan:Tokyo
China:Beijing
India:New Delhi
Thailand:Bangkok
Vietnam:Hanoi
Indonesia:Jakarta
Nepal:Kathmandu
Egypt:Cairo
Kenya:Nairobi
Morocco:Rabat
Ghana:Accra
Nigeria:Abuja
Ethiopia:Addis Ababa
Canada:Ottawa
Mexico:Mexico City
Cuba:Havana
Brazil:Brasilia
Argentina:Buenos Aires
Chile:Santiago
Peru:Lima
Colombia:Bogota
Australia:Canberra
New Zealand:Wellington
"""
)

ANIMALS = _animals(
    """
cat|mammal|meows|4|in a house|fish and meat|kitten|grey|soft and curious|small
dog|mammal|barks|4|in a house|meat and dog food|puppy|brown|loyal and playful|medium
cow|mammal|moos|4|on a farm|grass|calf|black and white|calm and gentle|big
horse|mammal|neighs|4|on a farm|hay and oats|foal|brown|strong and fast|big
sheep|mammal|bleats|4|on a farm|grass|lamb|white|woolly and quiet|medium
goat|mammal|bleats|4|on a farm|grass and leaves|kid|white|stubborn and clever|medium
pig|mammal|oinks|4|on a farm|corn and roots|piglet|pink|smart and muddy|medium
duck|bird|quacks|2|in a pond|plants and insects|duckling|white|noisy and cheerful|small
hen|bird|clucks|2|on a farm|seeds and grain|chick|red|busy and careful|small
goose|bird|honks|2|in a lake|grass and plants|gosling|white|loud and brave|small
owl|bird|hoots|2|in a forest|mice|owlet|brown|wise and silent|small
eagle|bird|screeches|2|in the mountains|fish and rabbits|eaglet|brown|proud and sharp-eyed|medium
parrot|bird|talks|2|in the jungle|fruit and nuts|chick|green|colourful and chatty|small
penguin|bird|squawks|2|on the icy coast|fish|chick|black and white|funny and friendly|medium
lion|mammal|roars|4|on the savanna|meat|cub|golden|brave and powerful|big
tiger|mammal|growls|4|in the jungle|meat|cub|orange with black stripes|quick and powerful|big
bear|mammal|growls|4|in a forest|fish, berries and honey|cub|brown|strong and sleepy|big
wolf|mammal|howls|4|in a forest|meat|pup|grey|clever and wild|medium
fox|mammal|yelps|4|in a forest|mice and berries|cub|red|sly and quick|small
rabbit|mammal|squeaks|4|in a burrow|grass and carrots|kit|grey|shy and quick|small
mouse|mammal|squeaks|4|in a hole|seeds and cheese|pup|grey|tiny and careful|tiny
elephant|mammal|trumpets|4|on the savanna|grass and leaves|calf|grey|huge and gentle|huge
giraffe|mammal|hums|4|on the savanna|leaves|calf|yellow with brown spots|tall and calm|huge
zebra|mammal|barks|4|on the savanna|grass|foal|black and white|fast and stripy|big
monkey|mammal|chatters|2|in the jungle|bananas and other fruit|infant|brown|funny and clever|medium
kangaroo|mammal|clicks|2|on the grassland|grass|joey|brown|bouncy and strong|big
koala|mammal|grunts|4|in a tree|eucalyptus leaves|joey|grey|sleepy and soft|small
camel|mammal|grunts|4|in the desert|dry plants|calf|sandy brown|tough and patient|big
deer|mammal|bleats|4|in a forest|grass and leaves|fawn|brown|shy and graceful|medium
frog|amphibian|croaks|4|in a pond|insects|tadpole|green|jumpy and wet|small
snake|reptile|hisses|0|in the grass|mice and frogs|snakelet|green|silent and smooth|medium
turtle|reptile|hisses|4|in the water|plants and small fish|hatchling|green|slow and patient|small
crocodile|reptile|growls|4|in a river|fish and meat|hatchling|green|dangerous and strong|big
shark|fish|makes no sound|0|in the sea|fish|pup|grey|fast and dangerous|big
whale|mammal|sings|0|in the sea|krill and fish|calf|blue-grey|enormous and gentle|huge
dolphin|mammal|clicks and whistles|0|in the sea|fish|calf|grey|clever and playful|big
octopus|sea animal|makes no sound|8|in the sea|crabs and shellfish|larva|red|clever and soft|medium
crab|sea animal|clicks|10|on the beach|small sea animals|larva|red|hard and sideways-walking|small
bee|insect|buzzes|6|in a hive|nectar|larva|yellow and black|busy and helpful|tiny
ant|insect|makes no sound|6|in an anthill|seeds and crumbs|larva|black|hard-working and strong|tiny
butterfly|insect|makes no sound|6|in a garden|nectar|caterpillar|many colours|light and pretty|tiny
spider|arachnid|makes no sound|8|in a web|insects|spiderling|black|patient and skilful|tiny
"""
)
SIZES = ["tiny", "small", "medium", "big", "huge"]

COLOUR_OF = _pairs(
    """
the sky:blue
grass:green
snow:white
a banana:yellow
a strawberry:red
a carrot:orange
coal:black
the sun:yellow
a lemon:yellow
a tomato:red
milk:white
chocolate:brown
a lime:green
a pumpkin:orange
a cucumber:green
the sea:blue
a cherry:red
a plum:purple
a rose:red
a flamingo:pink
an elephant:grey
a polar bear:white
a raven:black
a frog:green
an orange:orange
a blueberry:blue
a grape:purple
a stop sign:red
a fire engine:red
a leaf:green
a cloud:white
a panda:black and white
honey:golden
salt:white
sand:yellow
blood:red
a pine tree:green
an aubergine:purple
a swan:white
butter:yellow
"""
)

MIX = {
    ("red", "blue"): "purple",
    ("red", "yellow"): "orange",
    ("blue", "yellow"): "green",
    ("red", "white"): "pink",
    ("black", "white"): "grey",
    ("red", "green"): "brown",
    ("blue", "white"): "light blue",
    ("green", "white"): "light green",
}

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
MONTH_DAYS = [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]
SEASON = [
    "winter",
    "winter",
    "spring",
    "spring",
    "spring",
    "summer",
    "summer",
    "summer",
    "autumn",
    "autumn",
    "autumn",
    "winter",
]
PLANETS = ["Mercury", "Venus", "Earth", "Mars", "Jupiter", "Saturn", "Uranus", "Neptune"]

JOBS = _pairs(
    """
baker:bakes bread and cakes
teacher:teaches children at school
doctor:helps sick people
nurse:cares for patients
farmer:grows food and looks after animals
pilot:flies planes
chef:cooks food in a restaurant
firefighter:puts out fires
police officer:keeps people safe
dentist:looks after teeth
vet:helps sick animals
builder:builds houses
plumber:fixes water pipes
electrician:fixes electric wires
gardener:looks after plants
painter:paints walls and pictures
singer:sings songs
writer:writes books and stories
tailor:makes and mends clothes
fisherman:catches fish
astronaut:travels into space
mechanic:repairs cars
librarian:looks after books in a library
postman:delivers letters
carpenter:makes things from wood
programmer:writes code for computers
scientist:studies how the world works
judge:makes decisions in a court
sailor:works on a ship
photographer:takes photos
"""
)

TOOLS = _pairs(
    """
hammer:hit nails
saw:cut wood
knife:cut food
spoon:eat soup
fork:pick up food
cup:drink tea
pen:write
pencil:draw and write
brush:paint
broom:sweep the floor
key:open a lock
umbrella:stay dry in the rain
clock:tell the time
lamp:get light
towel:dry yourself
soap:wash your hands
scissors:cut paper
needle:sew clothes
rope:tie things
ladder:reach high places
map:find the way
camera:take photos
telephone:talk to people far away
computer:work and play games
fridge:keep food cold
oven:bake food
pillow:rest your head
blanket:stay warm
ruler:measure lengths
compass:find north
telescope:look at the stars
microscope:look at very small things
thermometer:measure temperature
bucket:carry water
glue:stick things together
"""
)

DEFINITIONS = _pairs(
    """
river:a long stream of water that flows to the sea
lake:a large area of water with land all around it
mountain:a very high piece of land
island:a piece of land with water all around it
desert:a very dry place with little rain
forest:a large place full of trees
volcano:a mountain that can throw out hot lava
beach:a sandy place next to the sea
cloud:a mass of tiny water drops in the sky
rain:water that falls from clouds
snow:soft white ice that falls from the sky
wind:air that moves
rainbow:a band of colours in the sky when sun meets rain
storm:bad weather with strong wind and rain
star:a huge ball of hot gas that shines in space
moon:a round body that goes around a planet
planet:a large round body that goes around a star
sun:the star at the centre of our solar system
school:a place where people learn
hospital:a place where sick people get help
library:a place where you can borrow books
museum:a place that shows old or interesting things
market:a place where people buy and sell things
bakery:a shop that sells bread and cakes
bridge:a road built over water or a valley
castle:a strong old building with thick walls
train:a vehicle that runs on rails
bicycle:a vehicle with two wheels and pedals
ship:a large boat that sails on the sea
plane:a machine with wings that flies
robot:a machine that can do tasks by itself
computer:a machine that works with information
battery:a small thing that stores electricity
mirror:a flat glass that shows your reflection
triangle:a shape with three sides
square:a shape with four equal sides
circle:a perfectly round shape
fruit:a sweet part of a plant that holds seeds
vegetable:a plant that people eat, like a carrot
bread:a food made from flour and water
cheese:a food made from milk
honey:a sweet food made by bees
tea:a hot drink made from leaves
soup:a hot liquid food
salad:a cold dish of mixed vegetables
friend:a person you like and trust
family:a group of people who are related
birthday:the day on which a person was born
holiday:a time when you do not work
dream:pictures and stories in your mind while you sleep
song:words set to music
poem:a piece of writing with rhythm and feeling
story:a description of events, real or made up
secret:something that only a few people know
promise:words that say you will surely do something
question:a sentence that asks for information
idea:a thought or plan in your mind
language:a system of words that people use to talk
number:a word or sign that tells how many
week:a period of seven days
month:one of the twelve parts of a year
year:a period of twelve months
hour:a period of sixty minutes
minute:a period of sixty seconds
winter:the coldest season of the year
summer:the warmest season of the year
spring:the season when plants begin to grow
autumn:the season when leaves fall from the trees
ice:frozen water
steam:hot water in the form of gas
gold:a yellow and very valuable metal
wood:the hard material that comes from trees
glass:a hard and clear material used for windows
paper:a thin material used for writing
map:a drawing that shows where places are
garden:a place where plants and flowers grow
kitchen:a room where people cook
bedroom:a room where people sleep
algorithm:a list of steps that solves a problem
variable:a name that holds a value in a program
program:a set of instructions for a computer
gravity:the force that pulls things to the ground
energy:the power to do work
oxygen:a gas that we breathe to live
heart:the organ that pumps blood
brain:the organ that we think with
lung:the organ that we breathe with
"""
)

BODY = _pairs(
    """
eyes:see
ears:hear
nose:smell
tongue:taste
teeth:bite and chew
hands:hold things
legs:walk and run
feet:stand
brain:think
heart:pump blood
lungs:breathe
skin:feel
"""
)

SHAPES = {"triangle": 3, "square": 4, "rectangle": 4, "pentagon": 5, "hexagon": 6, "octagon": 8}
