package luks

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"

	"nvstore.dev/image"
)

// Limits on LUKS2's JSON. Real headers have a few hundred values, five deep.
const (
	maxJSONDepth  = 24
	maxJSONValues = 1 << 16
	jsonStruct    = "LUKS2 metadata"
)

// badJSON is an error at a path such as "keyslots.0.kdf".
func badJSON(path string, got any, want string) *image.FormatError {
	return bad(jsonStruct, -1, path, got, want)
}

// An object is a JSON object of LUKS2's metadata, with its path for errors.
// Names are exact, where encoding/json would match other cases too.
type object struct {
	path string
	m    map[string]any
}

// parseJSON reads one object, with bounds on depth and number of values, and
// no name twice in an object: readers differ in which of two they take.
func parseJSON(p []byte) (object, error) {
	if !json.Valid(p) {
		return object{}, badJSON("", nil, "valid JSON")
	}
	dec := json.NewDecoder(bytes.NewReader(p))
	dec.UseNumber()
	r := jsonReader{dec: dec}
	v, err := r.value("", 0)
	if err != nil {
		return object{}, err
	}
	m, ok := v.(map[string]any)
	if !ok {
		return object{}, badJSON("", nil, "an object")
	}
	return object{"", m}, nil
}

type jsonReader struct {
	dec *json.Decoder
	n   int
}

func (r *jsonReader) value(path string, depth int) (any, error) {
	if r.n++; r.n > maxJSONValues {
		return nil, badJSON("", nil, fmt.Sprintf("%d values at most", maxJSONValues))
	}
	t, err := r.dec.Token()
	if err != nil {
		return nil, badJSON(path, err.Error(), "valid JSON")
	}
	d, ok := t.(json.Delim)
	if !ok {
		return t, nil
	}
	if depth == maxJSONDepth {
		return nil, badJSON("", nil, fmt.Sprintf("nesting of %d at most", maxJSONDepth))
	}
	if d == '[' {
		list := []any{}
		for r.dec.More() {
			v, err := r.value(path, depth+1)
			if err != nil {
				return nil, err
			}
			list = append(list, v)
		}
		_, err = r.dec.Token()
		return list, err
	}
	m := map[string]any{}
	for r.dec.More() {
		t, err := r.dec.Token()
		if err != nil {
			return nil, badJSON(path, err.Error(), "valid JSON")
		}
		name, _ := t.(string)
		at := join(path, name)
		if _, ok := m[name]; ok {
			return nil, badJSON(at, nil, "each name once")
		}
		if m[name], err = r.value(at, depth+1); err != nil {
			return nil, err
		}
	}
	_, err = r.dec.Token()
	return m, err
}

func join(path, name string) string {
	if len(name) > 64 {
		name = name[:64] + "..."
	}
	if path == "" || len(path) > 512 {
		return name
	}
	return path + "." + name
}

func (o object) at(name string) string { return join(o.path, name) }

func (o object) object(name string) (object, error) {
	m, ok := o.m[name].(map[string]any)
	if !ok {
		return object{}, badJSON(o.at(name), nil, "an object")
	}
	return object{o.at(name), m}, nil
}

func (o object) string(name string) (string, error) {
	s, ok := o.m[name].(string)
	if !ok {
		return "", badJSON(o.at(name), nil, "a string")
	}
	return s, nil
}

// number reads a JSON number in [lo, hi].
func (o object) number(name string, lo, hi int64) (int64, error) {
	s, ok := o.m[name].(json.Number)
	if !ok {
		return 0, badJSON(o.at(name), nil, "a number")
	}
	n, err := strconv.ParseInt(string(s), 10, 64)
	if err != nil || n < lo || n > hi {
		return 0, badJSON(o.at(name), string(s), fmt.Sprintf("%d to %d", lo, hi))
	}
	return n, nil
}

// bigNumber reads a number of 64 bits, which LUKS2 writes as a string, because
// JSON's may lose bits.
func (o object) bigNumber(name string, hi uint64) (uint64, error) {
	s, err := o.string(name)
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil || n > hi {
		return 0, badJSON(o.at(name), s, fmt.Sprintf("a string of a number to %d", hi))
	}
	return n, nil
}

// bytes reads base64 of lo to hi bytes.
func (o object) bytes(name string, lo, hi int) ([]byte, error) {
	s, err := o.string(name)
	if err != nil {
		return nil, err
	}
	p, err := base64.StdEncoding.DecodeString(s)
	if err != nil || len(p) < lo || len(p) > hi {
		return nil, badJSON(o.at(name), nil, fmt.Sprintf("base64 of %d to %d bytes", lo, hi))
	}
	return p, nil
}

// strings reads a list of strings.
func (o object) strings(name string) ([]string, error) {
	list, ok := o.m[name].([]any)
	if !ok {
		return nil, badJSON(o.at(name), nil, "a list")
	}
	out := make([]string, 0, len(list))
	for _, v := range list {
		s, ok := v.(string)
		if !ok {
			return nil, badJSON(o.at(name), nil, "a list of strings")
		}
		out = append(out, s)
	}
	return out, nil
}

// slotNumber reads an object's name that is a number from 0 to 31.
func slotNumber(path, name string) (int, error) {
	n, err := strconv.Atoi(name)
	if err != nil || n < 0 || n > 31 || strconv.Itoa(n) != name {
		return 0, badJSON(path, name, "names that are numbers from 0 to 31")
	}
	return n, nil
}

// jsonText cuts the JSON area at its first zero byte, which must be there.
func jsonText(area []byte) ([]byte, error) {
	text, rest, ok := bytes.Cut(area, []byte{0})
	if !ok {
		return nil, badJSON("", nil, "JSON that ends in a zero byte")
	}
	if strings.Trim(string(rest), "\x00") != "" {
		return nil, badJSON("", nil, "zeros after the JSON")
	}
	return text, nil
}
