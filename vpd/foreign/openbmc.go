package foreign

import (
	"encoding/json"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"

	"nvstore.dev/vpd/internal/spec"
)

// openBMC reads JSON that has the properties of a FRU as OpenBMC's FruDevice
// has them on D-Bus, plain or as busctl --json prints them; or an
// entity-manager configuration, of which it takes what the probe looks for, so
// that the configuration finds the FRU.
func openBMC(text []byte, _ *Options) (*result, error) {
	o, err := spec.Read(text)
	if err != nil {
		var list []json.RawMessage
		if json.Unmarshal(text, &list) != nil {
			return nil, err
		}
		o = spec.Object{{Name: "", Value: text}}
	}
	r := &result{}
	raw, err := o.MarshalJSON()
	if err != nil {
		return nil, err
	}
	found := findProperties(raw, 0)
	if len(found) == 0 {
		probes, err := findProbes(r, raw)
		if err != nil {
			return nil, err
		}
		found = probes
	}
	switch len(found) {
	case 0:
		return nil, spec.Errorf("", "has no properties such as BOARD_SERIAL_NUMBER, and no probe for them")
	case 1:
	default:
		r.notef("%d FRUs are in it; this is the first", len(found))
	}
	return r, r.fromProperties(found[0])
}

var property = regexp.MustCompile(`^(CHASSIS|BOARD|PRODUCT)_[A-Z0-9_]+$`)

// findProperties returns the objects that have such properties, in their
// order.
func findProperties(raw json.RawMessage, depth int) (found []map[string]string) {
	if len(raw) == 0 || depth > 32 {
		return nil
	}
	switch raw[0] {
	case '[':
		var list []json.RawMessage
		if json.Unmarshal(raw, &list) == nil {
			for _, e := range list {
				found = append(found, findProperties(e, depth+1)...)
			}
		}
	case '{':
		o, err := spec.ParseObject("", raw)
		if err != nil {
			return nil
		}
		own := map[string]string{}
		for _, m := range o {
			if v, ok := propertyValue(m.Value); ok && property.MatchString(m.Name) {
				own[m.Name] = v
				continue
			}
			found = append(found, findProperties(m.Value, depth+1)...)
		}
		if len(own) > 0 {
			found = append([]map[string]string{own}, found...)
		}
	}
	return found
}

// propertyValue: a string, a number, or {"type": "s", "data": ...}.
func propertyValue(raw json.RawMessage) (string, bool) {
	var variant struct{ Data *json.RawMessage }
	if json.Unmarshal(raw, &variant) == nil && variant.Data != nil {
		raw = *variant.Data
	}
	var s string
	if json.Unmarshal(raw, &s) == nil {
		return s, true
	}
	var n json.Number
	if json.Unmarshal(raw, &n) == nil {
		return n.String(), true
	}
	return "", false
}

var (
	probe  = regexp.MustCompile(`xyz\.openbmc_project\.FruDevice\((\{[^}]*\})\)`)
	pair   = regexp.MustCompile(`['"]([A-Z0-9_]+)['"]\s*:\s*(?:'([^']*)'|"([^"]*)"|([0-9]+))`)
	wildly = regexp.MustCompile(`[\\^$.*+?()\[\]{}|]`)
)

// findProbes takes what a configuration's probe looks for. A value there is a
// regular expression.
func findProbes(r *result, raw json.RawMessage) (found []map[string]string, err error) {
	var texts []string
	var walk func(raw json.RawMessage, depth int)
	walk = func(raw json.RawMessage, depth int) {
		if len(raw) == 0 || depth > 32 {
			return
		}
		switch raw[0] {
		case '"':
			var s string
			if json.Unmarshal(raw, &s) == nil {
				texts = append(texts, s)
			}
		case '[':
			var list []json.RawMessage
			if json.Unmarshal(raw, &list) == nil {
				for _, e := range list {
					walk(e, depth+1)
				}
			}
		case '{':
			if o, err := spec.ParseObject("", raw); err == nil {
				for _, m := range o {
					walk(m.Value, depth+1)
				}
			}
		}
	}
	walk(raw, 0)
	for _, text := range texts {
		for _, m := range probe.FindAllStringSubmatch(text, -1) {
			own := map[string]string{}
			for _, p := range pair.FindAllStringSubmatch(m[1], -1) {
				v := p[2] + p[3] + p[4]
				if !property.MatchString(p[1]) {
					continue // the bus or the address
				}
				if wildly.MatchString(v) {
					plain := strings.Trim(strings.NewReplacer(".*", "", `\.`, ".", "^", "", "$", "").Replace(v), " ")
					if re, err := regexp.Compile("^(?:" + v + ")$"); err != nil || !re.MatchString(plain) {
						return nil, spec.Errorf(p[1], "the probe %q is a regular expression that nothing plain can be made of", v)
					}
					r.notef("%s: the probe %q is a regular expression; %q is what it finds", p[1], v, plain)
					v = plain
				}
				own[p[1]] = v
			}
			if len(own) > 0 {
				found = append(found, own)
			}
		}
	}
	return found, nil
}

// openBMCNames maps FruDevice's names to those of a spec.
var openBMCNames = map[string][][2]string{
	"chassis": {{"CHASSIS_PART_NUMBER", "part_number"}, {"CHASSIS_SERIAL_NUMBER", "serial_number"}},
	"board": {{"BOARD_MANUFACTURER", "manufacturer"}, {"BOARD_PRODUCT_NAME", "product_name"}, {"BOARD_SERIAL_NUMBER", "serial_number"},
		{"BOARD_PART_NUMBER", "part_number"}, {"BOARD_FRU_VERSION_ID", "file_id"}},
	"product": {{"PRODUCT_MANUFACTURER", "manufacturer"}, {"PRODUCT_PRODUCT_NAME", "product_name"}, {"PRODUCT_PART_NUMBER", "part_number"},
		{"PRODUCT_VERSION", "version"}, {"PRODUCT_SERIAL_NUMBER", "serial_number"}, {"PRODUCT_ASSET_TAG", "asset_tag"}, {"PRODUCT_FRU_VERSION_ID", "file_id"}},
}

func (r *result) fromProperties(p map[string]string) error {
	r.spec.Add("format", "fru")
	used := map[string]bool{}
	take := func(name string) (string, bool) {
		used[name] = true
		v, ok := p[name]
		return v, ok
	}
	for _, area := range []string{"chassis", "board", "product"} {
		var o spec.Object
		prefix := strings.ToUpper(area) + "_"
		code, to := prefix+"LANGUAGE_CODE", "language"
		if area == "chassis" {
			code, to = "CHASSIS_TYPE", "type"
		}
		if v, ok := take(code); ok {
			n, err := strconv.ParseUint(v, 0, 8)
			if err != nil {
				return spec.Errorf(code, "%q, want a number from 0 to 255", v)
			}
			o.Add(to, n)
		}
		if v, ok := take("BOARD_MANUFACTURE_DATE"); ok && area == "board" {
			t, err := openBMCDate(v)
			if err != nil {
				return err
			}
			if t != "" {
				o.Add("date", t)
			}
		}
		for _, n := range openBMCNames[area] {
			if v, ok := take(n[0]); ok {
				o.Add(n[1], v)
			}
		}
		var custom []string
		for i := 1; ; i++ {
			v, ok := take(fmt.Sprintf("%sINFO_AM%d", prefix, i))
			if !ok {
				break
			}
			custom = append(custom, v)
		}
		if len(custom) > 0 {
			o.Add("custom", custom)
		}
		if len(o) > 0 {
			r.spec.Add(area, o)
		}
	}
	for name := range p {
		if !used[name] {
			return spec.Errorf(name, "is no property that FruDevice makes of a FRU")
		}
	}
	return nil
}

// openBMCDate: three ways in which versions of FruDevice have written it.
func openBMCDate(v string) (string, error) {
	for _, layout := range []string{"20060102T150405Z", "2006-01-02 - 15:04:05", "Mon Jan _2 15:04:05 2006", "Mon Jan 2 15:04:05 2006"} {
		if t, err := time.Parse(layout, strings.TrimSpace(v)); err == nil {
			if text := t.Format(fruDate); text != "1996-01-01T00:00Z" {
				return text, nil
			}
			return "", nil
		}
	}
	if v == "" {
		return "", nil
	}
	return "", spec.Errorf("BOARD_MANUFACTURE_DATE", "%q, want a date such as 20260131T120000Z", v)
}
