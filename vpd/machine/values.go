package machine

import (
	"encoding/json"
	"fmt"
	"maps"
	"math/big"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"nvstore.dev/vpd/internal/form"
	"nvstore.dev/vpd/internal/spec"
)

// A value is a text, or one that counts up.
type value struct {
	name  string
	first string
	last  string // empty if there is none
	step  uint64 // 0 if it is the same for all
}

var nameOfValue = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_.-]*$`)

func (m *Manifest) parseValues(whole spec.Object) error {
	raw, ok := whole.Get("values")
	if !ok {
		return nil
	}
	list, err := parseValues("values", raw)
	if err != nil {
		return err
	}
	for _, v := range list {
		m.values = slices.DeleteFunc(m.values, func(old value) bool { return old.name == v.name })
		m.values = append(m.values, v)
	}
	return nil
}

func parseValues(path string, raw json.RawMessage) ([]value, error) {
	o, err := spec.ParseObject(path, raw)
	if err != nil {
		return nil, err
	}
	var list []value
	for _, member := range o {
		v, err := parseValue(spec.Join(path, member.Name), member)
		if err != nil {
			return nil, err
		}
		list = append(list, v)
	}
	return list, nil
}

func parseValue(path string, m spec.Member) (value, error) {
	v := value{name: m.Name}
	if !nameOfValue.MatchString(m.Name) || m.Name == "n" {
		return v, spec.Errorf(path, "a value's name has letters, digits, underscores, dashes and periods, and is not n")
	}
	if len(m.Value) > 0 && m.Value[0] == '"' {
		var err error
		v.first, err = spec.String(path, m.Value)
		return v, err
	}
	o, err := spec.ParseObject(path, m.Value)
	if err != nil {
		return v, spec.Errorf(path, `want a string, or {"first": ..., "step": ..., "last": ...}`)
	}
	if err := o.Only(path, "first", "step", "last"); err != nil {
		return v, err
	}
	raw, ok := o.Get("first")
	if !ok {
		return v, spec.Errorf(path+".first", "missing")
	}
	if v.first, err = spec.String(path+".first", raw); err != nil {
		return v, err
	}
	if raw, ok := o.Get("last"); ok {
		if v.last, err = spec.String(path+".last", raw); err != nil {
			return v, err
		}
	}
	if v.step, err = form.Uint(o, path, "step", 1<<32, 1); err == nil && v.step == 0 {
		err = spec.Errorf(path+".step", "want 1 or more; a plain string is the same for all machines")
	}
	return v, err
}

// at is the value of machine n.
func (v *value) at(n int) (string, error) {
	if v.step == 0 {
		return v.first, nil
	}
	by := new(big.Int).Mul(big.NewInt(int64(n-1)), new(big.Int).SetUint64(v.step))
	s, err := advance(v.first, by)
	if err != nil || v.last == "" {
		return s, err
	}
	if len(s) != len(v.last) {
		return "", fmt.Errorf("%q has not the length of the last, %q", s, v.last)
	}
	if strings.ToLower(s) > strings.ToLower(v.last) {
		return "", fmt.Errorf("the numbers end at %q, and machine %d would have %q", v.last, n, s)
	}
	return s, nil
}

var (
	hexPairs = regexp.MustCompile(`^([0-9A-Fa-f]{2}[:-]){5}[0-9A-Fa-f]{2}$`)
	uuidForm = regexp.MustCompile(`^[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}$`)
)

// advance adds to a MAC address, to the last 12 digits of a UUID, or to the
// decimal number at a text's end, and keeps their length.
func advance(s string, by *big.Int) (string, error) {
	if by.Sign() == 0 {
		return s, nil
	}
	full := func() (string, error) { return "", fmt.Errorf("%q has no room for %d more", s, by) }
	switch {
	case hexPairs.MatchString(s):
		digits, sep := strings.NewReplacer(":", "", "-", "").Replace(s), s[2:3]
		out, ok := add(digits, by, 16)
		if !ok {
			return full()
		}
		var pairs []string
		for i := 0; i < 12; i += 2 {
			pairs = append(pairs, likeCase(s, out[i:i+2]))
		}
		return strings.Join(pairs, sep), nil
	case uuidForm.MatchString(s):
		out, ok := add(s[24:], by, 16)
		if !ok {
			return full()
		}
		return s[:24] + likeCase(s, out), nil
	}
	i := len(s)
	for i > 0 && s[i-1] >= '0' && s[i-1] <= '9' {
		i--
	}
	if i == len(s) {
		return "", fmt.Errorf("%q can't be counted up: it ends in no number, and is no MAC address", s)
	}
	out, ok := add(s[i:], by, 10)
	if !ok {
		return full()
	}
	return s[:i] + out, nil
}

func likeCase(model, s string) string {
	if strings.ToLower(model) != model {
		return strings.ToUpper(s)
	}
	return s
}

// add adds to a number of so many digits.
func add(digits string, by *big.Int, base int) (string, bool) {
	n, ok := new(big.Int).SetString(digits, base)
	if !ok {
		return "", false
	}
	out := n.Add(n, by).Text(base)
	if len(out) > len(digits) {
		return "", false
	}
	return strings.Repeat("0", len(digits)-len(out)) + out, true
}

// maxValues bounds the bytes that values put into a machine's strings, in all,
// since values may have values in them.
const maxValues = 64 << 20

// A scope has the values of one machine, for its strings.
type scope struct {
	all  map[string]string
	used *int // bytes of values put in
}

func newScope() *scope { return &scope{map[string]string{}, new(int)} }

// scope works out the values. A value may have those in it that stand in front
// of it, and n.
func (m *Manifest) scope(n int, given map[string]string) (*scope, error) {
	s := newScope()
	s.all["n"] = strconv.Itoa(n)
	for name, text := range given {
		if !nameOfValue.MatchString(name) || name == "n" {
			return nil, spec.Errorf("values", "%q can't be a value's name", name)
		}
		s.all[name] = text
	}
	if err := s.add("values", m.values, n, given); err != nil {
		return nil, err
	}
	return s, nil
}

func (s *scope) add(path string, list []value, n int, given map[string]string) error {
	for _, v := range list {
		if _, ok := given[v.name]; ok {
			continue
		}
		path := spec.Join(path, v.name)
		text, err := v.at(n)
		if err != nil {
			return spec.Errorf(path, "%v", err)
		}
		if s.all[v.name], err = s.expand(path, text); err != nil {
			return err
		}
	}
	return nil
}

// with is the scope with more values, for one blob.
func (s *scope) with(path string, list []value) (*scope, error) {
	t := &scope{maps.Clone(s.all), s.used}
	n, err := strconv.Atoi(s.all["n"])
	if err != nil {
		return nil, spec.Errorf(path, "%v", err)
	}
	if err := t.add(path, list, n, nil); err != nil {
		return nil, err
	}
	return t, nil
}

var reference = regexp.MustCompile(`^\{([A-Za-z_][A-Za-z0-9_.-]*?)(\+[0-9]{1,9})?(:0?[0-9]{1,2})?\}`)

// Expand puts a machine's values into a text, as in a manifest.
func (x *Machine) Expand(text string) (string, error) {
	return (&scope{x.Values, new(int)}).expand("", text)
}

func (s *scope) expand(path, text string) (string, error) {
	var out strings.Builder
	for {
		i := strings.IndexByte(text, '$')
		if i < 0 {
			out.WriteString(text)
			return out.String(), nil
		}
		out.WriteString(text[:i])
		text = text[i+1:]
		if strings.HasPrefix(text, "$") {
			out.WriteByte('$')
			text = text[1:]
			continue
		}
		m := reference.FindStringSubmatch(text)
		if m == nil {
			return "", spec.Errorf(path, "want ${name}, ${name+1} or ${name:04} behind $; $$ is a dollar sign")
		}
		v, err := s.lookup(path, m[1], m[2], m[3])
		if err != nil {
			return "", err
		}
		if *s.used += len(v); *s.used > maxValues {
			return "", spec.Errorf(path, "the values take more than %d bytes", maxValues)
		}
		out.WriteString(v)
		text = text[len(m[0]):]
	}
}

func (s *scope) lookup(path, name, plus, width string) (string, error) {
	v, ok := s.all[name]
	if !ok {
		var names []string
		for k := range s.all {
			names = append(names, k)
		}
		slices.Sort(names)
		return "", spec.Errorf(path, "no value %q; there are %s", name, strings.Join(names, ", "))
	}
	if plus != "" {
		by, _ := new(big.Int).SetString(plus[1:], 10)
		var err error
		if v, err = advance(v, by); err != nil {
			return "", spec.Errorf(path, "%v", err)
		}
	}
	if width != "" {
		n, _ := strconv.Atoi(width[1:])
		v = strings.Repeat("0", max(0, n-len(v))) + v
	}
	return v, nil
}

// expandAll does it in every string of JSON. Names of members stay.
func (s *scope) expandAll(path string, raw json.RawMessage) (json.RawMessage, error) {
	switch {
	case len(raw) > 0 && raw[0] == '"':
		text, err := spec.String(path, raw)
		if err != nil || !strings.Contains(text, "$") {
			return raw, err
		}
		if text, err = s.expand(path, text); err != nil {
			return nil, err
		}
		var o spec.Object
		o.Add("", text)
		return o[0].Value, nil
	case len(raw) > 0 && raw[0] == '{':
		o, err := spec.ParseObject(path, raw)
		if err != nil {
			return nil, err
		}
		for i, m := range o {
			if o[i].Value, err = s.expandAll(spec.Join(path, m.Name), m.Value); err != nil {
				return nil, err
			}
		}
		return append(spec.Object{}, o...).MarshalJSON()
	case len(raw) > 0 && raw[0] == '[':
		var list []json.RawMessage
		if err := json.Unmarshal(raw, &list); err != nil {
			return nil, spec.Errorf(path, "%v", err)
		}
		for i := range list {
			var err error
			if list[i], err = s.expandAll(path+"["+strconv.Itoa(i)+"]", list[i]); err != nil {
				return nil, err
			}
		}
		return json.Marshal(list)
	}
	return raw, nil
}
