{{- define "mtls.image" -}}
{{ .Values.image.repository }}{{ if .Values.image.digest }}@{{ .Values.image.digest }}{{ else }}:{{ .Values.image.tag | default .Chart.AppVersion }}{{ end }}
{{- end }}

{{- define "mtls.labels" -}}
app.kubernetes.io/name: mtls
app.kubernetes.io/component: {{ . }}
{{- end }}

{{- /* The default mount, but with a token that is asked for in sight, for one hour. */}}
{{- define "mtls.apiToken" -}}
- name: api-token
  projected:
    sources:
      - serviceAccountToken: {path: token, expirationSeconds: 3600}
      - configMap: {name: kube-root-ca.crt, items: [{key: ca.crt, path: ca.crt}]}
      - downwardAPI: {items: [{path: namespace, fieldRef: {fieldPath: metadata.namespace}}]}
{{- end }}

{{- /* node.config: what the chart sets itself over what the values ask for. */}}
{{- define "mtls.nodeConfig" -}}
{{- $own := dict "trust-domain" .Values.trustDomain "root-namespace" .Values.rootNamespace }}
{{- merge $own .Values.node.config | toYaml }}
{{- end }}
