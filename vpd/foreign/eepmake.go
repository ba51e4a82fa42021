package foreign

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"nvstore.dev/vpd/internal/spec"
)

// Sizes of the GPIO maps of a HAT: flags, power, and a byte for each pin.
const (
	bank0Pins = 28
	bank1Pins = 18
	pinUsed   = 1 << 7
)

// An eepReader reads settings of eepmake line by line, as its parse_command
// does (eeptools of raspberrypi/utils).
type eepReader struct {
	r      *result
	line   int
	vendor map[string]string
	banks  [2][]byte // flags, power, pins; nil if there are no settings for it
	dt     []byte
	hasDT  bool
	custom [][]byte
	supply string
	blob   *[]byte // that lines of data go to
	quoted bool    // in text that a backslash and a quote end
}

func eepmake(text []byte, _ *Options) (*result, error) {
	e := &eepReader{r: &result{}, vendor: map[string]string{}}
	s := bufio.NewScanner(bytes.NewReader(text))
	s.Buffer(nil, len(text)+1)
	for s.Scan() {
		e.line++
		if err := e.read(s.Text()); err != nil {
			return nil, err
		}
	}
	if e.quoted {
		return nil, e.bad("the text has no end, which is \\\"")
	}
	return e.r, e.spec()
}

func (e *eepReader) bad(format string, args ...any) error {
	return spec.Errorf(fmt.Sprintf("line %d", e.line), format, args...)
}

func (e *eepReader) read(line string) error {
	line = strings.TrimRight(line, "\r")
	if e.quoted {
		return e.text(line)
	}
	// In one line of text, a # is a character for us; eepmake cuts there.
	quotes := 0
	for i, c := range []byte(line) {
		if c == '"' {
			quotes++
		}
		if c == '#' && quotes%2 == 0 {
			line = line[:i]
			break
		}
	}
	line = strings.TrimSpace(line)
	if line == "" {
		return nil
	}
	word, rest, _ := strings.Cut(strings.ReplaceAll(line, "\t", " "), " ")
	return e.command(word, strings.TrimSpace(rest), line)
}

// text reads a line of a long text; each ends with a newline in the data.
func (e *eepReader) text(line string) error {
	for i := 0; i < len(line); i++ {
		c := line[i]
		if c != '\\' {
			*e.blob = append(*e.blob, c)
			continue
		}
		if i++; i == len(line) {
			return e.bad("a backslash ends the line")
		}
		switch line[i] {
		case 'r':
			*e.blob = append(*e.blob, '\r')
		case '\\':
			*e.blob = append(*e.blob, '\\')
		case '0':
			*e.blob = append(*e.blob, 0)
			return nil
		case '"':
			e.quoted = false
			return nil
		default:
			return e.bad("unknown escape \\%c", line[i])
		}
	}
	*e.blob = append(*e.blob, '\n')
	return nil
}

var gpioFlag = regexp.MustCompile(`^(bank1_)?(gpio_drive|gpio_slew|gpio_hysteresis|back_power)$`)

func (e *eepReader) command(word, rest, line string) error {
	switch {
	case word == "product_uuid" || word == "product_id" || word == "product_ver":
		e.vendor[word] = rest
	case word == "vendor" || word == "product":
		if len(rest) < 2 || rest[0] != '"' || rest[len(rest)-1] != '"' {
			return e.bad("want the %s in quotes", word)
		}
		e.vendor[word] = rest[1 : len(rest)-1]
	case word == "current_supply":
		e.supply = rest
	case gpioFlag.MatchString(word):
		return e.flag(word, rest)
	case word == "setgpio":
		return e.pin(rest)
	case word == "dt_blob":
		if e.hasDT {
			return e.bad("a second dt_blob")
		}
		e.hasDT, e.blob = true, &e.dt
		return e.data(rest)
	case word == "custom_data":
		e.custom = append(e.custom, nil)
		e.blob = &e.custom[len(e.custom)-1]
		return e.data(rest)
	case word == "end":
		e.blob = nil
	case e.blob != nil:
		return e.data(line)
	default:
		return e.bad("unknown setting %q", word)
	}
	return nil
}

// data reads text in quotes, or hexadecimal digits, of which any others are
// left out as eepmake does; but it says so.
func (e *eepReader) data(text string) error {
	if strings.HasPrefix(text, `"`) {
		if text == `"` {
			e.quoted = true
			return nil
		}
		body, after, ok := strings.Cut(text[1:], `"`)
		if !ok || strings.TrimSpace(after) != "" {
			return e.bad("want a text with a quote at its end")
		}
		*e.blob = append(*e.blob, body...)
		return nil
	}
	var digits strings.Builder
	for _, c := range []byte(text) {
		switch {
		case strings.IndexByte("0123456789abcdefABCDEF", c) >= 0:
			digits.WriteByte(c)
		case strings.IndexByte(" \t,:-", c) < 0:
			return e.bad("%q is no hexadecimal data", text)
		}
	}
	b, err := hex.DecodeString(digits.String())
	if err != nil {
		return e.bad("an odd number of hexadecimal digits")
	}
	*e.blob = append(*e.blob, b...)
	return nil
}

func (e *eepReader) bank(n int) []byte {
	if e.banks[n] == nil {
		e.banks[n] = make([]byte, 2+[]int{bank0Pins, bank1Pins}[n])
	}
	return e.banks[n]
}

func (e *eepReader) flag(word, rest string) error {
	n := 0
	if name, ok := strings.CutPrefix(word, "bank1_"); ok {
		n, word = 1, name
	}
	v, err := strconv.ParseUint(strings.TrimPrefix(rest, "0x"), 16, 8)
	limit := map[string]uint64{"gpio_drive": 8, "gpio_slew": 2, "gpio_hysteresis": 2, "back_power": 2}[word]
	if err != nil || v > limit || n == 1 && word == "back_power" {
		return e.bad("%s %s: want a number from 0 to %d", word, rest, limit)
	}
	bank := e.bank(n)
	switch word {
	case "gpio_drive":
		bank[0] |= byte(v)
	case "gpio_slew":
		bank[0] |= byte(v) << 4
	case "gpio_hysteresis":
		bank[0] |= byte(v) << 6
	case "back_power":
		bank[1] = byte(v)
	}
	return nil
}

var (
	functions = []string{"INPUT", "OUTPUT", "ALT5", "ALT4", "ALT0", "ALT1", "ALT2", "ALT3"}
	pulls     = []string{"DEFAULT", "UP", "DOWN", "NONE"}
)

// pin reads "4 INPUT DEFAULT": bits 2:0 the function, 6:5 the pull, 7 that the
// board uses the pin.
func (e *eepReader) pin(rest string) error {
	words := strings.Fields(rest)
	if len(words) != 3 {
		return e.bad("setgpio wants a number, a function and a pull")
	}
	n, err := strconv.Atoi(words[0])
	if err != nil || n < 0 || n >= bank0Pins+bank1Pins {
		return e.bad("setgpio %s: want a GPIO from 0 to %d", words[0], bank0Pins+bank1Pins-1)
	}
	fn, pull := slices.Index(functions, words[1]), slices.Index(pulls, words[2])
	if fn < 0 || pull < 0 {
		return e.bad("setgpio %d: want one of %s, and one of %s", n, strings.Join(functions, ", "), strings.Join(pulls, ", "))
	}
	bank := 0
	if n >= bank0Pins {
		bank, n = 1, n-bank0Pins
	}
	e.bank(bank)[2+n] = byte(pinUsed | pull<<5 | fn)
	return nil
}

// spec puts the atoms in eepmake's order. A HAT+ has no GPIO map, so one that
// has is a HAT.
func (e *eepReader) spec() error {
	version := 2
	if e.banks[0] != nil || e.banks[1] != nil {
		version = 1
	}
	e.r.spec.Add("format", "hat")
	e.r.spec.Add("version", version)
	var vendor spec.Object
	uuid := e.vendor["product_uuid"]
	if strings.Trim(uuid, "0-") == "" {
		return spec.Errorf("product_uuid", "is zero or missing, for which eepmake makes a random one; write one down")
	}
	vendor.Add("uuid", uuid)
	for _, n := range [][2]string{{"product_id", "product_id"}, {"product_ver", "product_version"}} {
		v, err := strconv.ParseUint(strings.TrimPrefix(strings.ToLower(e.vendor[n[0]]), "0x"), 16, 16)
		if err != nil && e.vendor[n[0]] != "" {
			return spec.Errorf(n[0], "%q, want a hexadecimal number of 16 bits", e.vendor[n[0]])
		}
		vendor.Add(n[1], fmt.Sprintf("0x%04x", v))
	}
	vendor.Add("vendor", e.vendor["vendor"])
	vendor.Add("product", e.vendor["product"])
	var atoms []spec.Object
	add := func(name string, v any) {
		var o spec.Object
		o.Add(name, v)
		atoms = append(atoms, o)
	}
	add("vendor", vendor)
	if e.banks[0] != nil {
		add("gpio_bank0", typedValue{Type: "hex", Data: hex.EncodeToString(e.banks[0])})
	}
	if e.hasDT {
		add("device_tree", spec.Show(e.dt))
	}
	if e.supply != "" {
		n, err := strconv.ParseUint(e.supply, 0, 32)
		if err != nil {
			return spec.Errorf("current_supply", "%q, want a number of milliamps", e.supply)
		}
		if n != 0 {
			add("power_supply_ma", n)
		}
	}
	for _, b := range e.custom {
		add("custom", spec.Show(b))
	}
	if e.banks[1] != nil {
		add("gpio_bank1", typedValue{Type: "hex", Data: hex.EncodeToString(e.banks[1])})
	}
	e.r.spec.Add("atoms", atoms)
	return nil
}
